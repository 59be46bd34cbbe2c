// Greedy non-maximum suppression of several images and groups on the GPU, with the output of nms_cpu.cpp, bit for bit.
//
// Boxes are sorted by image and score by one key. Then one block per image visits its boxes in that order, 64 at a
// time: all threads compare them with the boxes kept so far and with each other, one thread resolves the 64 on bits,
// and the survivors join the kept ones. So the work is at most visited * kept IoUs, as on the CPU, no matrix over
// all pairs is stored, and an image that has max_keep boxes stops. The images run in parallel on different
// multiprocessors; the others idle, since later kernels of the batch need its proposals.
//
// The groups of an image depend on each other only through max_keep. Without it, a second sort brings together the
// boxes of each group, and every group of every image has its own block. 2000 boxes in 80 groups then are 80 blocks
// that visit 25 boxes in one step, instead of one block that takes 32 steps and compares each box with up to 2000 kept
// ones.
//
// `nms` synchronizes with the GPU once for the size of its result, and once more for the number of images if there are
// several. `nms_padded`, whose result has a fixed size, never does.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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
at::Tensor as_float4_rows(const at::Tensor& boxes) {
  const at::Tensor flat = boxes.contiguous();
  return reinterpret_cast<std::uintptr_t>(flat.const_data_ptr<float>()) % sizeof(float4) ? flat.clone() : flat;
}

// The boxes of all images in the order in which they are visited.
struct Sorted {
  at::Tensor rows, groups, keys, order;  // boxes, their groups or undefined, sorted keys, indices

  Sorted(const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups_of,
         const std::optional<at::Tensor>& images, int64_t count, cudaStream_t stream)
      : rows(as_float4_rows(boxes)), groups(groups_of ? groups_of->contiguous() : at::Tensor()) {
    const int64_t n = boxes.size(0);
    const at::Tensor flat_scores = scores.contiguous(), flat_images = images ? images->contiguous() : at::Tensor();
    const at::Tensor unsorted = at::empty({n}, boxes.options().dtype(at::kLong));
    constexpr int64_t kPerBlock = 256;
    key_kernel<<<static_cast<unsigned>((n + kPerBlock - 1) / kPerBlock), kPerBlock, 0, stream>>>(
        flat_scores.const_data_ptr<float>(), images ? flat_images.const_data_ptr<int64_t>() : nullptr, n, count,
        unsorted.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    std::tie(keys, order) = at::sort(unsorted, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  }

  Candidates candidates(double iou_threshold, const int64_t* places) const {
    return {reinterpret_cast<const float4*>(rows.const_data_ptr<float>()),
            groups.defined() && !places ? groups.const_data_ptr<int64_t>() : nullptr, order.const_data_ptr<int64_t>(),
            places, static_cast<float>(iou_threshold)};
  }
};

// Runs greedy_kernel, whose pitch is that of `kept`, or -1. Returns the number of kept boxes (count,) of each image.
at::Tensor run_greedy(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t limit,
                      int64_t pitch, const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images,
                      int64_t count, const at::Tensor& kept) {
  const int64_t n = boxes.size(0);
  const auto integers = boxes.options().dtype(at::kLong);
  if (n == 0 || count == 0 || limit == 0) return at::zeros({count}, integers);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Sorted sorted(boxes, scores, groups, images, count, stream);
  const at::Tensor counts = at::empty({count}, integers);
  greedy_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      sorted.candidates(iou_threshold, nullptr), sorted.keys.const_data_ptr<int64_t>(), n, limit, pitch,
      kept.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
}

// Runs group_greedy_kernel, whose results are at the place of each kept box in `kept`.
void run_group_greedy(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, const at::Tensor& groups,
                      const std::optional<at::Tensor>& images, int64_t count, const at::Tensor& kept) {
  const int64_t n = boxes.size(0);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Sorted sorted(boxes, scores, groups, images, count, stream);
  const auto [group, places] =
      at::sort(sorted.groups.index_select(0, sorted.order), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor scratch = at::empty_like(kept);
  group_greedy_kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(
      sorted.candidates(iou_threshold, places.const_data_ptr<int64_t>()), sorted.keys.const_data_ptr<int64_t>(),
      group.const_data_ptr<int64_t>(), n, scratch.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep,
                    const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t n = boxes.size(0), limit = max_keep < 0 ? n : max_keep;
  std::optional<at::Tensor> image_index;
  int64_t count = 1;
  if (images && n > 0) {
    const auto [ids, index, sizes] = at::_unique2(*images, /*sorted=*/true, /*return_inverse=*/true);
    image_index = index, count = ids.size(0);
  }
  const at::Tensor kept = at::full({n}, -1, boxes.options().dtype(at::kLong));
  if (groups && n > 0 && limit >= n) {
    run_group_greedy(boxes, scores, iou_threshold, *groups, image_index, count, kept);
  } else {
    run_greedy(boxes, scores, iou_threshold, limit, /*pitch=*/-1, groups, image_index, count, kept);
  }
  return kept.masked_select(kept.ge(0));
}

std::tuple<at::Tensor, at::Tensor> nms_padded_cuda(const at::Tensor& boxes, const at::Tensor& scores,
                                                   double iou_threshold, int64_t max_keep, const at::Tensor& images,
                                                   int64_t count, const std::optional<at::Tensor>& groups) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  check_padded(max_keep, count);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const at::Tensor kept = at::full({count, max_keep}, -1, boxes.options().dtype(at::kLong));
  const at::Tensor counts = run_greedy(boxes, scores, iou_threshold, max_keep, max_keep, groups, images, count, kept);
  return {kept, counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) {
  m.impl("nms", &nms_cuda);
  m.impl("nms_padded", &nms_padded_cuda);
}

}  // namespace refdet
