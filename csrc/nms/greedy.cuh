// The kernels of nms_cuda.cu. They do not depend on PyTorch, so that tests can run them thread by thread on a CPU
// (tests/ops/cuda_threads.h).
#pragma once

#include <cstdint>

namespace refdet {

using Bits = unsigned long long;
constexpr int kChunk = 64;      // candidates processed together: one bit of a word each
constexpr int kThreads = 1024;  // per block, a multiple of kChunk
constexpr int kSlices = kThreads / kChunk;
constexpr int kSharedKept = 1024;        // kept boxes of an image that are held in shared memory
constexpr int64_t kNoImage = INT64_MAX;  // key of a box without an image
constexpr unsigned kAllLanes = 0xffffffffu;

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

// Lower bound: the first of n ascending keys that is not below `key`.
inline __device__ int64_t lower_bound(const int64_t* keys, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (keys[middle] < key) {
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

// The candidates of a launch, for all of its blocks. `order` has the indices of the boxes by ascending key: by image,
// then by descending score. Candidate number i is at place places[i] of `order`, or without `places` at place i.
struct Candidates {
  const float4* boxes;
  const int64_t *groups, *order, *places;
  float threshold;

  __device__ int64_t place(int64_t number) const { return places ? places[number] : number; }
};

// NMS of the candidates begin to end - 1 by a block of kThreads, best first, until `limit` are kept. Writes the indices
// of the kept boxes to `kept`, and to `kept_by_place`, if given, at the place of each. Returns their number.
inline __device__ int64_t keep_greedily(const Candidates& all, int64_t begin, int64_t end, int64_t limit, int64_t* kept,
                                        int64_t* kept_by_place) {
  __shared__ float4 kept_boxes[kSharedKept];
  __shared__ int64_t kept_groups[kSharedKept];
  __shared__ float4 candidates[kChunk];
  __shared__ float areas[kChunk];
  __shared__ int64_t own_groups[kChunk];
  __shared__ Bits row[kChunk];  // bit j of row[i]: candidate i suppresses the later candidate j
  __shared__ Bits suppressed;   // bit j: a kept box suppresses candidate j
  __shared__ Bits survivors;
  const int thread = threadIdx.x, column = thread % kChunk, slice = thread / kChunk;
  const float threshold = all.threshold;
  int64_t total = 0;  // the same in every thread

  for (int64_t start = begin; start < end && total < limit; start += kChunk) {
    const int count = static_cast<int>(end - start < kChunk ? end - start : kChunk);
    int64_t index = 0, place = 0;
    if (thread < count) {
      place = all.place(start + thread);
      index = all.order[place];
      candidates[thread] = all.boxes[index];
      areas[thread] = area_of(candidates[thread]);
      own_groups[thread] = all.groups ? all.groups[index] : 0;
    }
    if (thread < kChunk) row[thread] = 0;
    if (thread == 0) suppressed = 0;
    __syncthreads();  // the chunk is loaded, and `kept` and kept_boxes hold what the last chunk wrote

    // All lanes of a warp look at the same kept box. The vote brings them together again after each one: where groups
    // differ, lanes that left each other would otherwise walk through the kept boxes one after another.
    const bool present = column < count;
    const float4 box = present ? candidates[column] : float4{};
    const float area = present ? areas[column] : 0.0f;
    const int64_t group = present ? own_groups[column] : 0;
    bool done = !present;
    for (int64_t k = slice; k < total; k += kSlices) {
      const bool is_shared = k < kSharedKept;
      const int64_t other_index = is_shared ? 0 : kept[k];
      const int64_t other_group = is_shared ? kept_groups[k] : all.groups ? all.groups[other_index] : 0;
      if (!done && other_group == group) {
        const float4 other = is_shared ? kept_boxes[k] : all.boxes[other_index];
        done = suppresses(other, box, area_of(other), area, threshold);
      }
      if (__all_sync(kAllLanes, done)) break;
    }
    if (present) {
      if (done) {
        atomicOr(&suppressed, Bits{1} << column);
      } else {
        for (int i = slice; i < column; i += kSlices) {
          if (own_groups[i] == group && suppresses(candidates[i], box, areas[i], area, threshold))
            atomicOr(&row[i], Bits{1} << column);
        }
      }
    }
    __syncthreads();  // `suppressed` and `row` are complete

    if (thread == 0) {
      Bits removed = suppressed, alive = 0;
      int64_t remaining = limit - total;
      for (int i = 0; i < count && remaining > 0; ++i) {
        if (removed >> i & 1) continue;
        alive |= Bits{1} << i;
        removed |= row[i];
        --remaining;
      }
      survivors = alive;
    }
    __syncthreads();  // `survivors` is written; it is overwritten only two barriers later

    const Bits alive = survivors;
    if (thread < count && (alive >> thread & 1)) {
      const int64_t k = total + __popcll(alive & ((Bits{1} << thread) - 1));
      kept[k] = index;
      if (kept_by_place) kept_by_place[place] = index;
      if (k < kSharedKept) {
        kept_boxes[k] = candidates[thread];
        kept_groups[k] = own_groups[thread];
      }
    }
    total += __popcll(alive);
  }
  return total;
}

// NMS of one image by each block. The boxes of image i are those of the sorted keys in i << 32 to (i + 1) << 32. Writes
// the indices of the kept boxes, best first, and their number.
//
// `kept` of image i begins at i * pitch, or, if pitch is negative, at the place of its first box.
__global__ void __launch_bounds__(kThreads) greedy_kernel(Candidates all, const int64_t* keys, int64_t n, int64_t limit,
                                                          int64_t pitch, int64_t* kept, int64_t* counts) {
  __shared__ int64_t ends[2];
  const int64_t image = blockIdx.x;
  if (threadIdx.x < 2) ends[threadIdx.x] = lower_bound(keys, n, (image + threadIdx.x) << 32);
  __syncthreads();
  int64_t* const own_kept = kept + (pitch < 0 ? ends[0] : image * pitch);
  const int64_t total = keep_greedily(all, ends[0], ends[1], limit, own_kept, nullptr);
  if (threadIdx.x == 0) counts[image] = total;
}

// The same without a limit, where the groups of an image do not depend on each other: NMS of one group of one image by
// the block that has the number of its first candidate; the others end at once. `places` sorts by group, then by place,
// and so by group, image and score; `sorted_groups` is the group of each candidate. Writes `kept` at the place of each
// kept box; `scratch` has room for n.
__global__ void __launch_bounds__(kThreads)
    group_greedy_kernel(Candidates all, const int64_t* keys, const int64_t* sorted_groups, int64_t n, int64_t* scratch,
                        int64_t* kept) {
  const int64_t begin = blockIdx.x, group = sorted_groups[begin], image = keys[all.places[begin]] >> 32;
  const auto belongs = [&](int64_t number) {
    return sorted_groups[number] == group && keys[all.places[number]] >> 32 == image;
  };
  if (begin > 0 && belongs(begin - 1)) return;  // the whole block
  int64_t last = begin, end = n;                // `last` belongs to the group, `end` does not
  while (end - last > 1) {
    const int64_t middle = last + (end - last) / 2;
    (belongs(middle) ? last : end) = middle;
  }
  keep_greedily(all, begin, end, /*limit=*/n, scratch + begin, kept);
}

}  // namespace refdet
