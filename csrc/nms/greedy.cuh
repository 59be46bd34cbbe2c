// The kernels of nms_cuda.cu. They do not depend on PyTorch, so that tests can run them thread by thread on a CPU
// (tests/ops/cuda_threads.h).
#pragma once

#include <cstdint>

namespace refdet {

using Bits = unsigned long long;
constexpr int kChunk = 64;           // candidates processed together: one bit of a word each
constexpr int kThreads = 1024;       // per block, a multiple of kChunk
constexpr int kSlices = kThreads / kChunk;
constexpr int kFast = 1024;          // kept boxes of an image that are held in shared memory
constexpr int64_t kNoImage = INT64_MAX;  // key of a box without an image

// Sort keys: by image, then by descending score; -0 and +0 are equal, NaN counts as -inf. A stable sort keeps ties by
// index.
__global__ void key_kernel(const float* scores, const int64_t* images, int64_t n, int64_t count, int64_t* keys) {
  const int64_t box = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (box >= n) return;
  const int64_t image = images ? images[box] : 0;
  if (image < 0 || image >= count) {
    keys[box] = kNoImage;
    return;
  }
  const float score = scores[box];
  const uint32_t bits = score != score ? 0xff800000u : __float_as_uint(__fadd_rn(score, 0.0f));
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  keys[box] = image << 32 | static_cast<int64_t>(~ascending);
}

// Lower bound: the first of n ascending keys that is not below `least`.
inline __device__ int64_t first_from(const int64_t* keys, int64_t n, int64_t least) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < least) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The _rn functions are never fused into multiply-adds, so that rounding is as on the CPU.
inline __device__ float area_of(float4 box) { return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y)); }

inline __device__ bool suppresses(float4 a, float4 b, float area_a, float area_b, float threshold) {
  const float width = fmaxf(__fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)), 0.0f);
  const float overlap = __fmul_rn(width, height);
  if (!(overlap > 0.0f)) return false;  // 0/x and NaN never exceed a threshold, which is at least 0
  return __fdiv_rn(overlap, __fsub_rn(__fadd_rn(area_a, area_b), overlap)) > threshold;
}

// NMS of one image by each block of kThreads. The boxes of image i are those of the sorted keys in i << 32 to
// (i + 1) << 32; `order` has their indices. Writes the indices of the kept boxes, best first, and their number.
//
// `kept` of image i begins at i * pitch, or, if pitch is negative, at the index of its first box among the sorted keys.
__global__ void __launch_bounds__(kThreads)
    greedy_kernel(const float4* boxes, const int64_t* groups, const int64_t* keys, const int64_t* order, int64_t n,
                  float threshold, int64_t limit, int64_t pitch, int64_t* kept, int64_t* counts) {
  __shared__ int64_t ends[2];
  __shared__ float4 kept_boxes[kFast];
  __shared__ int64_t kept_groups[kFast];
  __shared__ float4 candidates[kChunk];
  __shared__ float areas[kChunk];
  __shared__ int64_t own_groups[kChunk];
  __shared__ Bits row[kChunk];  // bit j of row[i]: candidate i suppresses the later candidate j
  __shared__ Bits gone;         // bit j: a kept box suppresses candidate j
  __shared__ Bits survivors;
  const int thread = threadIdx.x, column = thread % kChunk, slice = thread / kChunk;
  const int64_t image = blockIdx.x;
  if (thread < 2) ends[thread] = first_from(keys, n, (image + thread) << 32);
  __syncthreads();
  const int64_t begin = ends[0], end = ends[1];
  int64_t* const mine = kept + (pitch < 0 ? begin : image * pitch);
  int64_t total = 0;  // the same in every thread

  for (int64_t start = begin; start < end && total < limit; start += kChunk) {
    const int count = static_cast<int>(end - start < kChunk ? end - start : kChunk);
    if (thread < count) {
      const int64_t index = order[start + thread];
      candidates[thread] = boxes[index];
      areas[thread] = area_of(candidates[thread]);
      own_groups[thread] = groups ? groups[index] : 0;
    }
    if (thread < kChunk) row[thread] = 0;
    if (thread == 0) gone = 0;
    __syncthreads();  // the chunk is loaded, and `mine` and kept_boxes hold what the last chunk wrote

    if (column < count) {
      const float4 box = candidates[column];
      const float area = areas[column];
      const int64_t group = own_groups[column];
      bool hit = false;
      for (int64_t k = slice; k < total; k += kSlices) {
        const bool fast = k < kFast;
        const int64_t index = fast ? 0 : mine[k];
        const int64_t other_group = fast ? kept_groups[k] : groups ? groups[index] : 0;
        if (other_group != group) continue;
        const float4 other = fast ? kept_boxes[k] : boxes[index];
        if (suppresses(other, box, area_of(other), area, threshold)) {
          hit = true;
          break;
        }
      }
      if (hit) {
        atomicOr(&gone, Bits{1} << column);
      } else {
        for (int i = slice; i < column; i += kSlices) {
          if (own_groups[i] == group && suppresses(candidates[i], box, areas[i], area, threshold))
            atomicOr(&row[i], Bits{1} << column);
        }
      }
    }
    __syncthreads();  // `gone` and `row` are complete

    if (thread == 0) {
      Bits dead = gone, alive = 0;
      int64_t room = limit - total;
      for (int i = 0; i < count && room > 0; ++i) {
        if (dead >> i & 1) continue;
        alive |= Bits{1} << i;
        dead |= row[i];
        --room;
      }
      survivors = alive;
    }
    __syncthreads();  // `survivors` is written; it is overwritten only two barriers later

    const Bits alive = survivors;
    if (thread < count && (alive >> thread & 1)) {
      const int64_t k = total + __popcll(alive & ((Bits{1} << thread) - 1));
      mine[k] = order[start + thread];
      if (k < kFast) {
        kept_boxes[k] = candidates[thread];
        kept_groups[k] = own_groups[thread];
      }
    }
    total += __popcll(alive);
  }
  if (thread == 0) counts[image] = total;
}

}  // namespace refdet
