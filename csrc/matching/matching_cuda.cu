// Matching of N candidate boxes to M objects by IoU, on the GPU, with the output of matching_cpu.cpp, bit for bit. Each
// image is a row of the grid, so that a batch takes as many launches as a single image.
//
// Cost: at most 2 N M IoUs, and memory for N + M values and M more per kThreads candidates; no IoU matrix.
//
// Speed: a thread keeps its candidate in registers, objects are in shared memory, and each box is read from global
// memory once. The best IoU of an object is reduced within a warp, only if some lane overlaps it, then in shared memory
// within the block, and over the blocks by one atomic maximum per block; maxima do not depend on their order. A second
// pass finds the candidates with the highest IoU of an object, but only in blocks whose own highest IoU is the same.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "matching/matching.h"

namespace refdet {
namespace {

constexpr int kThreads = 256;  // candidates in a block
constexpr int kObjects = 256;  // objects in shared memory at a time
constexpr int kWarp = 32;
constexpr int kMaxImages = 65535;  // rows of a grid
constexpr unsigned kAllLanes = 0xffffffffu;

struct Box {
  float x1, y1, x2, y2, area;
};

// The _rn functions are never fused into multiply-adds, so that rounding is as on the CPU.
__device__ Box box_at(const float* boxes, int64_t i) {
  Box box{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3], 0.0f};
  box.area = __fmul_rn(__fsub_rn(box.x2, box.x1), __fsub_rn(box.y2, box.y1));
  return box;
}

__device__ float iou(const Box& a, const Box& b) {
  const float width = fmaxf(__fsub_rn(fminf(a.x2, b.x2), fmaxf(a.x1, b.x1)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(a.y2, b.y2), fmaxf(a.y1, b.y1)), 0.0f);
  const float overlap = __fmul_rn(width, height);
  const float union_area = __fsub_rn(__fadd_rn(a.area, b.area), overlap);
  return union_area > 0.0f ? __fdiv_rn(overlap, fmaxf(union_area, kMinUnion)) : 0.0f;
}

// Non-negative floats sort like their bits as integers, for which there is an atomic maximum.
__device__ void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}

// Writes `max_iou` and `object` of each candidate, and the highest IoU of each object over all candidates to
// `object_max` and over the candidates of each block to `block_max`. `stride` is the number of floats from the first
// candidate of an image to that of the next, 0 if the images share their candidates.
__global__ void match_kernel(const float* candidates, int64_t stride, int64_t n, const float* objects, int64_t m,
                             float* max_iou, int64_t* object, float* object_max, float* block_max) {
  __shared__ Box shared_objects[kObjects];
  __shared__ float shared_max[kObjects];
  const int thread = threadIdx.x;
  const int64_t i = blockIdx.x * int64_t{kThreads} + thread, image = blockIdx.y;
  candidates += image * stride, objects += 4 * image * m;
  max_iou += image * n, object += image * n;
  object_max += image * m, block_max += image * gridDim.x * m;
  // threads beyond the candidates use an empty box, which overlaps nothing, and stay active for their warp
  const Box candidate = i < n ? box_at(candidates, i) : Box{};
  float best_iou = 0.0f;
  int64_t best_object = 0;
  for (int64_t first = 0; first < m; first += kObjects) {
    const int count = static_cast<int>(min(int64_t{kObjects}, m - first));
    for (int j = thread; j < count; j += kThreads) {
      shared_objects[j] = box_at(objects, first + j);
      shared_max[j] = 0.0f;
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      float pair_iou = iou(candidate, shared_objects[j]);
      if (pair_iou > best_iou) best_iou = pair_iou, best_object = first + j;
      if (!__any_sync(kAllLanes, pair_iou > 0.0f)) continue;
      for (int step = kWarp / 2; step > 0; step /= 2)
        pair_iou = fmaxf(pair_iou, __shfl_xor_sync(kAllLanes, pair_iou, step));
      if (thread % kWarp == 0) atomic_max(&shared_max[j], pair_iou);
    }
    __syncthreads();
    for (int j = thread; j < count; j += kThreads) {
      block_max[blockIdx.x * m + first + j] = shared_max[j];
      if (shared_max[j] > 0.0f) atomic_max(&object_max[first + j], shared_max[j]);
    }
    __syncthreads();
  }
  if (i < n) max_iou[i] = best_iou, object[i] = best_object;
}

// Writes `is_best` of each candidate; the arguments are those of match_kernel.
__global__ void best_kernel(const float* candidates, int64_t stride, int64_t n, const float* objects, int64_t m,
                            const float* object_max, const float* block_max, bool* is_best) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x, image = blockIdx.y;
  candidates += image * stride, objects += 4 * image * m;
  object_max += image * m, block_max += image * gridDim.x * m;
  if (i >= n) return;
  const Box candidate = box_at(candidates, i);
  bool reached = false;
  for (int64_t j = 0; j < m; ++j) {
    // the same for all threads of the block
    if (!(object_max[j] > 0.0f) || block_max[blockIdx.x * m + j] != object_max[j]) continue;
    reached |= iou(candidate, box_at(objects, j)) == object_max[j];
  }
  is_best[image * n + i] = reached;
}

Matches match_boxes_cuda(const at::Tensor& candidates, const at::Tensor& objects) {
  const MatchSizes sizes = check_match_boxes(candidates, objects);
  const c10::cuda::CUDAGuard guard(candidates.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = sizes.candidates, m = sizes.objects, blocks = (n + kThreads - 1) / kThreads;
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "match_boxes: too many candidates: ", n);
  TORCH_CHECK(sizes.images <= kMaxImages, "match_boxes: too many images: ", sizes.images);
  const at::Tensor flat_candidates = candidates.contiguous(), flat_objects = objects.contiguous();
  const at::Tensor max_iou = match_output(candidates, objects, at::kFloat);
  const at::Tensor object = match_output(candidates, objects, at::kLong);
  const at::Tensor is_best = match_output(candidates, objects, at::kBool);
  if (n == 0 || sizes.images == 0) return {max_iou, object, is_best};

  const at::Tensor object_max = at::zeros({sizes.images, m}, candidates.options());
  const at::Tensor block_max = at::empty({sizes.images, blocks, m}, candidates.options());
  const float* candidate = flat_candidates.const_data_ptr<float>();
  const float* object_boxes = flat_objects.const_data_ptr<float>();
  const int64_t stride = 4 * sizes.first_candidate(1);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(sizes.images));
  match_kernel<<<grid, kThreads, 0, stream>>>(candidate, stride, n, object_boxes, m, max_iou.mutable_data_ptr<float>(),
                                              object.mutable_data_ptr<int64_t>(), object_max.mutable_data_ptr<float>(),
                                              block_max.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  best_kernel<<<grid, kThreads, 0, stream>>>(candidate, stride, n, object_boxes, m, object_max.const_data_ptr<float>(),
                                             block_max.const_data_ptr<float>(), is_best.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {max_iou, object, is_best};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) { m.impl("match_boxes", &match_boxes_cuda); }

}  // namespace refdet
