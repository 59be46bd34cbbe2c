// Greedy non-maximum suppression on the GPU: the answer of nms_cpu.cpp, bit for bit.
//
// What: see nms_cpu.cpp. The boxes are sorted by score first; from then on a box is its place in that order.
//
// Cost: the sort, half the IoUs of all pairs among the boxes visited, and 8 kRows N / 64 bytes.
//
// Why fast: the rows are taken in slabs of kRows. For each slab one kernel computes in parallel which later boxes each
// box would suppress, one bit a pair; then one block goes through the slab, 64 boxes at a time: one thread settles
// those among themselves on bits in shared memory, and all threads together strike out what the survivors suppress.
// Nothing waits for the host until the number kept is read at the end, and once max_keep are kept the kernels of the
// slabs that follow return at once. Slabs also bound the memory: 100,000 boxes take 25 MB instead of 1.25 GB.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

#include "nms.h"

namespace refdet {
namespace {

using Bits = unsigned long long;
constexpr int kWord = 64;           // boxes in a word of bits, and threads in a block of suppress_kernel
constexpr int64_t kRows = 32 * 64;  // boxes in a slab
constexpr int kScanThreads = 512;

// The _rn functions are never fused into multiply-adds, so every operation rounds as it does on the CPU.
__device__ float area_of(float4 box) {
  return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y));
}

__device__ bool suppresses(float4 a, float4 b, float area_a, float area_b, float threshold) {
  const float width = fmaxf(__fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)), 0.0f);
  const float overlap = __fmul_rn(width, height);
  return __fdiv_rn(overlap, __fsub_rn(__fadd_rn(area_a, area_b), overlap)) > threshold;
}

// Bit j of bits[row - first_row][word] says whether box `row` suppresses the later box 64 * word + j.
// A block does 64 rows and one word; words before the diagonal are left as they are and never read.
__global__ void suppress_kernel(const float4* boxes, int64_t n, int64_t words, int64_t first_row, float threshold,
                                int64_t limit, const int64_t* count, Bits* bits) {
  if (*count >= limit) return;
  const int64_t first_word = first_row / kWord;
  const int64_t word = first_word + blockIdx.x, row_word = first_word + blockIdx.y;
  if (word < row_word) return;
  __shared__ float4 others[kWord];
  __shared__ float areas[kWord];
  const int columns = static_cast<int>(min(static_cast<int64_t>(kWord), n - word * kWord));
  const int thread = threadIdx.x;
  if (thread < columns) {
    others[thread] = boxes[word * kWord + thread];
    areas[thread] = area_of(others[thread]);
  }
  __syncthreads();
  const int64_t row = row_word * kWord + thread;
  if (row >= n) return;
  const float4 box = boxes[row];
  const float area = area_of(box);
  Bits found = 0;
  for (int j = word == row_word ? thread + 1 : 0; j < columns; ++j) {
    if (suppresses(box, others[j], area, areas[j], threshold)) found |= Bits{1} << j;
  }
  bits[(row - first_row) * words + word] = found;
}

// Goes through the boxes of one slab in order. One block. `removed` (a bit a box), `kept` (places of the survivors)
// and `count` (how many) carry over to the next slab.
__global__ void scan_kernel(const Bits* bits, int64_t n, int64_t words, int64_t first_row, int64_t end_row,
                            int64_t limit, Bits* removed, int64_t* kept, int64_t* count) {
  __shared__ Bits own[kWord];
  __shared__ Bits survivors;
  const int thread = threadIdx.x;
  int64_t total = *count;
  for (int64_t start = first_row; start < end_row && total < limit; start += kWord) {
    const int64_t word = start / kWord;
    const int rows = static_cast<int>(min(static_cast<int64_t>(kWord), n - start));
    const Bits* slab = bits + (start - first_row) * words;
    if (thread < rows) own[thread] = slab[thread * words + word];
    __syncthreads();
    if (thread == 0) {
      Bits gone = removed[word], alive = 0;
      int64_t next = total;
      for (int i = 0; i < rows && next < limit; ++i) {
        if (gone >> i & 1) continue;
        alive |= Bits{1} << i;
        gone |= own[i];
        kept[next++] = start + i;
      }
      survivors = alive;
    }
    __syncthreads();
    const Bits alive = survivors;
    total += __popcll(alive);
    for (int64_t later = word + 1 + thread; later < words; later += blockDim.x) {
      Bits gone = removed[later];
      for (Bits left = alive; left; left &= left - 1) gone |= slab[(__ffsll(left) - 1) * words + later];
      removed[later] = gone;
    }
    __syncthreads();
  }
  if (thread == 0) *count = total;
}

at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep) {
  check_nms(boxes, scores, iou_threshold);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = boxes.size(0), words = (n + kWord - 1) / kWord;
  const int64_t limit = max_keep < 0 ? n : std::min(max_keep, n);
  const auto integers = boxes.options().dtype(at::kLong);
  if (limit == 0) return at::empty({0}, integers);

  const at::Tensor known = scores.masked_fill(scores.isnan(), -std::numeric_limits<double>::infinity());
  const at::Tensor order = std::get<1>(at::sort(known, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  const at::Tensor sorted = boxes.index_select(0, order).contiguous();
  const at::Tensor bits = at::empty({std::min(kRows, words * kWord), words}, integers);
  const at::Tensor removed = at::zeros({words}, integers), count = at::zeros({1}, integers);
  const at::Tensor kept = at::empty({limit}, integers);
  auto* bits_at = reinterpret_cast<Bits*>(bits.mutable_data_ptr<int64_t>());
  auto* removed_at = reinterpret_cast<Bits*>(removed.mutable_data_ptr<int64_t>());
  const auto* sorted_at = reinterpret_cast<const float4*>(sorted.const_data_ptr<float>());

  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t end = std::min(first + kRows, n);
    const dim3 grid(static_cast<unsigned>(words - first / kWord),
                    static_cast<unsigned>((end - first + kWord - 1) / kWord));
    suppress_kernel<<<grid, kWord, 0, stream>>>(sorted_at, n, words, first, static_cast<float>(iou_threshold), limit,
                                                count.const_data_ptr<int64_t>(), bits_at);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    scan_kernel<<<1, kScanThreads, 0, stream>>>(bits_at, n, words, first, end, limit, removed_at,
                                                kept.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return order.index_select(0, kept.narrow(0, 0, count.item<int64_t>()));
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) { m.impl("nms", &nms_cuda); }

}  // namespace refdet
