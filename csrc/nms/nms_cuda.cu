// Greedy non-maximum suppression of several images and groups on the GPU, with the output of nms_cpu.cpp, bit for bit.
//
// Boxes are sorted by image and score by one key. Then one block per image visits its boxes in that order, 64 at a
// time: all threads compare them with the boxes kept so far and with each other, one thread resolves the 64 on bits,
// and the survivors join the kept ones. So the work is at most visited * kept IoUs, as on the CPU, no matrix over
// all pairs is stored, and an image that has max_keep boxes stops. The images run in parallel on different
// multiprocessors; the others idle, since later kernels of the batch need its proposals.
//
// `nms` synchronizes with the GPU once for the size of its result, and once more for the number of images if there are
// several. `nms_padded`, whose result has a fixed size, never does.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "nms/greedy.cuh"
#include "nms/nms.h"

namespace refdet {
namespace {

// Boxes that can be read 16 bytes at a time.
at::Tensor in_rows_of_float4(const at::Tensor& boxes) {
  const at::Tensor flat = boxes.contiguous();
  return reinterpret_cast<std::uintptr_t>(flat.const_data_ptr<float>()) % sizeof(float4) ? flat.clone() : flat;
}

// Runs greedy_kernel, whose pitch is that of `kept`, or -1. Returns the number of kept boxes (count,) of each image.
at::Tensor run(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t limit, int64_t pitch,
               const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images, int64_t count,
               const at::Tensor& kept) {
  const int64_t n = boxes.size(0);
  const auto integers = boxes.options().dtype(at::kLong);
  if (n == 0 || count == 0 || limit == 0) return at::zeros({count}, integers);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor rows = in_rows_of_float4(boxes), flat_scores = scores.contiguous();
  const at::Tensor flat_groups = groups ? groups->contiguous() : at::Tensor();
  const at::Tensor flat_images = images ? images->contiguous() : at::Tensor();
  const at::Tensor keys = at::empty({n}, integers), counts = at::empty({count}, integers);

  constexpr int64_t kPerBlock = 256;
  key_kernel<<<static_cast<unsigned>((n + kPerBlock - 1) / kPerBlock), kPerBlock, 0, stream>>>(
      flat_scores.const_data_ptr<float>(), images ? flat_images.const_data_ptr<int64_t>() : nullptr, n, count,
      keys.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  greedy_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      reinterpret_cast<const float4*>(rows.const_data_ptr<float>()),
      groups ? flat_groups.const_data_ptr<int64_t>() : nullptr, sorted.const_data_ptr<int64_t>(),
      order.const_data_ptr<int64_t>(), n, static_cast<float>(iou_threshold), limit, pitch,
      kept.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
}

at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep,
                    const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t n = boxes.size(0), limit = max_keep < 0 ? n : max_keep;
  std::optional<at::Tensor> numbered;
  int64_t count = 1;
  if (images && n > 0) {
    const auto [ids, number, sizes] = at::_unique2(*images, /*sorted=*/true, /*return_inverse=*/true);
    numbered = number, count = ids.size(0);
  }
  const at::Tensor kept = at::full({n}, -1, boxes.options().dtype(at::kLong));
  run(boxes, scores, iou_threshold, limit, /*pitch=*/-1, groups, numbered, count, kept);
  return kept.masked_select(kept.ge(0));
}

std::tuple<at::Tensor, at::Tensor> nms_padded_cuda(const at::Tensor& boxes, const at::Tensor& scores,
                                                   double iou_threshold, int64_t max_keep, const at::Tensor& images,
                                                   int64_t count, const std::optional<at::Tensor>& groups) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  check_padded(max_keep, count);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const at::Tensor kept = at::full({count, max_keep}, -1, boxes.options().dtype(at::kLong));
  const at::Tensor counts = run(boxes, scores, iou_threshold, max_keep, max_keep, groups, images, count, kept);
  return {kept, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) {
  m.impl("nms", &nms_cuda);
  m.impl("nms_padded", &nms_padded_cuda);
}

}  // namespace refdet
