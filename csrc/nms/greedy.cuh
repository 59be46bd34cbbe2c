// The kernels of nms_cuda.cu. They do not depend on PyTorch, so that tests can run them thread by thread on a CPU
// (tests/ops/cuda_threads.h).
#pragma once

#include <cstdint>

namespace refdet {

using Bits = unsigned long long;
constexpr int kChunk = 64;                  // candidates processed together: one for each bit of a word
constexpr int kThreads = 1024;              // per block, a multiple of kChunk
constexpr int kSlices = kThreads / kChunk;  // threads that share the comparisons of one candidate
constexpr int kSharedKept = 1024;           // kept boxes of an image that are held in shared memory
constexpr int64_t kNoImage = INT64_MAX;     // key of a box whose image is not in the batch; sorts it last
constexpr int64_t kUnpadded = -1;           // a special value of kept_stride; see greedy_kernel
constexpr unsigned kAllLanes = 0xffffffffu;

// Sort keys, whose ascending order is by image (the upper 32 bits), then by descending score (the lower 32 bits). -0
// and +0 are equal, NaN counts as -inf. Boxes with the same key keep the order of their indices, as the sort is stable.
// `images` is null if all boxes are of one image.
__global__ void key_kernel(const float* scores, const int64_t* images, int64_t n, int64_t num_images, int64_t* keys) {
  const int64_t box = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (box >= n) return;
  const int64_t image = images ? images[box] : 0;
  if (image < 0 || image >= num_images) {
    keys[box] = kNoImage;
    return;
  }
  const float score = scores[box];
  // -inf for NaN; adding 0 turns -0 into +0
  const uint32_t bits = score != score ? 0xff800000u : __float_as_uint(__fadd_rn(score, 0.0f));
  // an unsigned integer that ascends with the score
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  keys[box] = image << 32 | static_cast<int64_t>(~ascending);
}

// Position of the first of n ascending keys that is not below `key`, or n.
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

// The compiler never fuses the _rn functions into multiply-adds, so they round as on the CPU.
inline __device__ float area_of(float4 box) { return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y)); }

// Whether the IoU of two boxes exceeds the threshold.
inline __device__ bool suppresses(float4 a, float4 b, float area_a, float area_b, float threshold) {
  const float width = fmaxf(__fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)), 0.0f);
  const float overlap = __fmul_rn(width, height);
  if (!(overlap > 0.0f)) return false;  // the IoU is 0 or NaN, which exceeds no threshold of 0 or more
  return __fdiv_rn(overlap, __fsub_rn(__fadd_rn(area_a, area_b), overlap)) > threshold;
}

// All boxes of a launch as candidates, ordered so that each block takes consecutive ones. `order` has the indices of
// the boxes by ascending key: by image, then by descending score. Candidate i is the box order[positions[i]], or, if
// `positions` is null, order[i]. A box suppresses only boxes of its own group, such as a class.
struct Candidates {
  const float4* boxes;
  const int64_t* groups;  // of each box; null if the boxes of a block are all of one group
  const int64_t *order, *positions;
  float threshold;

  __device__ int64_t position(int64_t candidate) const { return positions ? positions[candidate] : candidate; }
};

// NMS of the candidates begin to end - 1, best first, until `limit` are kept; all kThreads threads of a block call it.
// Writes the indices of the kept boxes to `kept`, one after another, and, if `kept_by_position` is not null, there too,
// each at the position of the box in `order`. Returns the number of kept boxes.
inline __device__ int64_t keep_greedily(const Candidates& all, int64_t begin, int64_t end, int64_t limit, int64_t* kept,
                                        int64_t* kept_by_position) {
  __shared__ float4 kept_boxes[kSharedKept];
  __shared__ int64_t kept_groups[kSharedKept];
  __shared__ float4 candidates[kChunk];
  __shared__ float areas[kChunk];
  __shared__ int64_t candidate_groups[kChunk];
  __shared__ Bits row[kChunk];  // bit j of row[i]: candidate i suppresses the later candidate j
  __shared__ Bits suppressed;   // bit j: a kept box suppresses candidate j
  __shared__ Bits survivors;    // bit j: candidate j is kept
  // a thread compares candidate `column` with every kSlices-th box, from number `slice` on
  const int thread = threadIdx.x, column = thread % kChunk, slice = thread / kChunk;
  const float threshold = all.threshold;
  int64_t total = 0;  // kept boxes; the same in every thread

  for (int64_t start = begin; start < end && total < limit; start += kChunk) {
    const int count = static_cast<int>(end - start < kChunk ? end - start : kChunk);
    int64_t index = 0, position = 0;
    if (thread < count) {
      position = all.position(start + thread);
      index = all.order[position];
      candidates[thread] = all.boxes[index];
      areas[thread] = area_of(candidates[thread]);
      candidate_groups[thread] = all.groups ? all.groups[index] : 0;
    }
    if (thread < kChunk) row[thread] = 0;
    if (thread == 0) suppressed = 0;
    __syncthreads();  // the chunk is loaded, and `kept` and kept_boxes include the survivors of the previous one

    // All lanes of a warp look at the same kept box. The vote makes them converge after each one: otherwise lanes that
    // diverged because their groups differ would go through the kept boxes one lane after another.
    const bool present = column < count;
    const float4 box = present ? candidates[column] : float4{};
    const float area = present ? areas[column] : 0.0f;
    const int64_t group = present ? candidate_groups[column] : 0;
    bool done = !present;  // becomes true if a kept box suppresses the candidate
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
          if (candidate_groups[i] == group && suppresses(candidates[i], box, areas[i], area, threshold))
            atomicOr(&row[i], Bits{1} << column);
        }
      }
    }
    __syncthreads();  // `suppressed` and `row` are complete; one thread decides

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
    __syncthreads();  // `survivors` is written; the next chunk overwrites it two barriers later, when all have read it

    const Bits alive = survivors;
    if (thread < count && (alive >> thread & 1)) {
      const int64_t k = total + __popcll(alive & ((Bits{1} << thread) - 1));
      kept[k] = index;
      if (kept_by_position) kept_by_position[position] = index;
      if (k < kSharedKept) {
        kept_boxes[k] = candidates[thread];
        kept_groups[k] = candidate_groups[thread];
      }
    }
    total += __popcll(alive);
  }
  return total;
}

// NMS of image i by block i. The keys of image i are those from i << 32 to below (i + 1) << 32. Writes the indices of
// the kept boxes of each image, best first, to `kept`, and their number to `kept_counts`.
//
// The kept boxes of image i begin at element i * kept_stride of `kept`, or, if kept_stride is kUnpadded, at the
// position of the image's first box in `order`.
__global__ void __launch_bounds__(kThreads) greedy_kernel(Candidates all, const int64_t* keys, int64_t n, int64_t limit,
                                                          int64_t kept_stride, int64_t* kept, int64_t* kept_counts) {
  __shared__ int64_t range[2];  // positions of the image's first box and of the next image's
  const int64_t image = blockIdx.x;
  if (threadIdx.x < 2) range[threadIdx.x] = lower_bound(keys, n, (image + threadIdx.x) << 32);
  __syncthreads();
  int64_t* const own_kept = kept + (kept_stride == kUnpadded ? range[0] : image * kept_stride);
  const int64_t total = keep_greedily(all, range[0], range[1], limit, own_kept, /*kept_by_position=*/nullptr);
  if (threadIdx.x == 0) kept_counts[image] = total;
}

// NMS without a limit, so that the groups of an image are independent of each other. `positions` sorts the candidates by
// group, then by position in `order`, so that candidates of the same group and image are consecutive, best first;
// `sorted_groups` has the group of each candidate. There is a block per candidate: the block of the first candidate of
// a group in an image processes all of that group, the other blocks return at once. Every box must have an image, so no
// key is kNoImage. Writes the index of each kept box to `kept`, at the position of the box in `order`; `scratch` has n
// elements.
__global__ void __launch_bounds__(kThreads)
    group_greedy_kernel(Candidates all, const int64_t* keys, const int64_t* sorted_groups, int64_t n, int64_t* scratch,
                        int64_t* kept) {
  const int64_t begin = blockIdx.x, group = sorted_groups[begin], image = keys[all.positions[begin]] >> 32;
  const auto belongs = [&](int64_t candidate) {
    return sorted_groups[candidate] == group && keys[all.positions[candidate]] >> 32 == image;
  };
  if (begin > 0 && belongs(begin - 1)) return;  // all threads of the block
  int64_t last = begin, end = n;                // bisection: `last` belongs to the group, `end` does not
  while (end - last > 1) {
    const int64_t middle = last + (end - last) / 2;
    (belongs(middle) ? last : end) = middle;
  }
  keep_greedily(all, begin, end, /*limit=*/n, /*kept=*/scratch + begin, /*kept_by_position=*/kept);
}

}  // namespace refdet
