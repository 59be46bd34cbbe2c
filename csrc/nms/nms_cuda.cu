// Greedy non-maximum suppression of several images and groups on the GPU, with the output of nms_cpu.cpp, bit for bit.
// Only boxes of the same image and group suppress each other; max_keep limits the kept boxes of each image.
//
// A single sort, with image and score in one key, orders the boxes. Then one block per image visits its boxes in that
// order, 64 at a time: all threads compare the 64 with the boxes kept so far and with each other, one thread decides
// from the resulting bit masks which of them survive, and the survivors are kept. So each visited box is compared with
// at most all kept boxes, as on the CPU, and with the others of its 64; no matrix over all pairs is stored; and a block
// stops as soon as its image has max_keep boxes. The images run in parallel, each on one multiprocessor; with fewer
// images than multiprocessors the rest of the GPU is idle, since the next kernels wait for these results.
//
// The groups of an image depend on each other only through max_keep. Without this limit, a second sort brings together
// the boxes of each group, and every group of every image has its own block. 2000 boxes in 80 groups then are 80 blocks
// that visit 25 boxes in one step, instead of one block that takes 32 steps and compares each box with up to 2000 kept
// ones.
//
// `nms` waits for the GPU once for the size of its result and, if it is given `images`, once more for their number.
// `nms_padded`, whose result has a fixed size, never waits.

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

// The boxes (N, 4), contiguous and aligned so that each can be read as one float4.
at::Tensor as_float4(const at::Tensor& boxes) {
  const at::Tensor flat = boxes.contiguous();
  return reinterpret_cast<std::uintptr_t>(flat.const_data_ptr<float>()) % sizeof(float4) ? flat.clone() : flat;
}

// The boxes of all images, and the order in which they are visited.
struct Sorted {
  at::Tensor boxes;   // (N, 4)
  at::Tensor groups;  // (N,) group of each box; undefined if all are of one group
  at::Tensor keys;    // (N,) of key_kernel, ascending
  at::Tensor order;   // (N,) index of the box with each key

  Sorted(const at::Tensor& boxes, const at::Tensor& scores, const std::optional<at::Tensor>& groups,
         const std::optional<at::Tensor>& images, int64_t num_images, cudaStream_t stream)
      : boxes(as_float4(boxes)), groups(groups ? groups->contiguous() : at::Tensor()) {
    const int64_t n = boxes.size(0);
    const at::Tensor flat_scores = scores.contiguous(), flat_images = images ? images->contiguous() : at::Tensor();
    const at::Tensor unsorted = at::empty({n}, boxes.options().dtype(at::kLong));
    constexpr int64_t kPerBlock = 256;
    key_kernel<<<static_cast<unsigned>((n + kPerBlock - 1) / kPerBlock), kPerBlock, 0, stream>>>(
        flat_scores.const_data_ptr<float>(), images ? flat_images.const_data_ptr<int64_t>() : nullptr, n, num_images,
        unsorted.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    std::tie(keys, order) = at::sort(unsorted, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  }

  // The candidates of greedy_kernel.
  Candidates by_image(double iou_threshold) const {
    return candidates(groups.defined() ? groups.const_data_ptr<int64_t>() : nullptr, /*positions=*/nullptr,
                      iou_threshold);
  }

  // The candidates of group_greedy_kernel. They have no groups, since all boxes of a block are of the same group.
  Candidates by_group(const at::Tensor& positions, double iou_threshold) const {
    return candidates(/*own_groups=*/nullptr, positions.const_data_ptr<int64_t>(), iou_threshold);
  }

 private:
  Candidates candidates(const int64_t* own_groups, const int64_t* positions, double iou_threshold) const {
    return {reinterpret_cast<const float4*>(boxes.const_data_ptr<float>()), own_groups, order.const_data_ptr<int64_t>(),
            positions, static_cast<float>(iou_threshold)};
  }
};

// Runs greedy_kernel, which writes the indices of the kept boxes to `kept` (greedy.cuh explains where, by
// `kept_stride`). `limit` is the maximum number of boxes to keep per image; `images` has their indices from 0 to
// num_images - 1. Returns the number of kept boxes of each image, (num_images,).
at::Tensor run_greedy(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t limit,
                      int64_t kept_stride, const std::optional<at::Tensor>& groups,
                      const std::optional<at::Tensor>& images, int64_t num_images, const at::Tensor& kept) {
  const int64_t n = boxes.size(0);
  const auto integers = boxes.options().dtype(at::kLong);
  if (n == 0 || num_images == 0 || limit == 0) return at::zeros({num_images}, integers);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Sorted sorted(boxes, scores, groups, images, num_images, stream);
  const at::Tensor kept_counts = at::empty({num_images}, integers);
  greedy_kernel<<<static_cast<unsigned>(num_images), kThreads, 0, stream>>>(
      sorted.by_image(iou_threshold), sorted.keys.const_data_ptr<int64_t>(), n, limit, kept_stride,
      kept.mutable_data_ptr<int64_t>(), kept_counts.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return kept_counts;
}

// Runs group_greedy_kernel, which writes the index of each kept box to `kept` (N,), at the position of the box in
// `order`, and leaves the other elements as they are.
void run_group_greedy(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, const at::Tensor& groups,
                      const std::optional<at::Tensor>& images, int64_t num_images, const at::Tensor& kept) {
  const int64_t n = boxes.size(0);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Sorted sorted(boxes, scores, groups, images, num_images, stream);
  const auto [sorted_groups, positions] =
      at::sort(sorted.groups.index_select(0, sorted.order), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor scratch = at::empty_like(kept);
  group_greedy_kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(
      sorted.by_group(positions, iou_threshold), sorted.keys.const_data_ptr<int64_t>(),
      sorted_groups.const_data_ptr<int64_t>(), n, scratch.mutable_data_ptr<int64_t>(),
      kept.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep,
                    const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t n = boxes.size(0), limit = max_keep < 0 ? n : max_keep;
  std::optional<at::Tensor> image_indices;  // 0, 1, ... in the order of the ids, which are arbitrary
  int64_t num_images = 1;
  if (images && n > 0) {
    const auto [ids, indices, sizes] = at::_unique2(*images, /*sorted=*/true, /*return_inverse=*/true);
    image_indices = indices, num_images = ids.size(0);  // this size is known only when the GPU has finished
  }
  const at::Tensor kept = at::full({n}, -1, boxes.options().dtype(at::kLong));
  if (groups && n > 0 && limit >= n) {
    run_group_greedy(boxes, scores, iou_threshold, *groups, image_indices, num_images, kept);
  } else {
    run_greedy(boxes, scores, iou_threshold, limit, kUnpadded, groups, image_indices, num_images, kept);
  }
  return kept.masked_select(kept.ge(0));  // elements that no kept box was written to are still -1
}

// `images` has indices from 0 to num_images - 1; boxes with another index are ignored.
std::tuple<at::Tensor, at::Tensor> nms_padded_cuda(const at::Tensor& boxes, const at::Tensor& scores,
                                                   double iou_threshold, int64_t max_keep, const at::Tensor& images,
                                                   int64_t num_images, const std::optional<at::Tensor>& groups) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  check_nms_padded(max_keep, num_images);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const at::Tensor kept = at::full({num_images, max_keep}, -1, boxes.options().dtype(at::kLong));
  const at::Tensor kept_counts = run_greedy(boxes, scores, iou_threshold, /*limit=*/max_keep, /*kept_stride=*/max_keep,
                                            groups, images, num_images, kept);
  return {kept, kept_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) {
  m.impl("nms", &nms_cuda);
  m.impl("nms_padded", &nms_padded_cuda);
}

}  // namespace refdet
