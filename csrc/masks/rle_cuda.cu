// Mask probabilities of boxes to COCO's compressed RLE of the image, on the GPU: the answer of rle_cpu.cpp, bit for
// bit.
//
// What: see rle_cpu.cpp. The device finds where the runs of each mask begin and end; only these positions are copied,
// and the host makes the strings, areas and tight boxes of them, as rle_cpu.cpp does.
//
// Cost: two times the bilinear interpolation of every pixel of the boxes, 4 bytes written and copied for each end of a
// run, 8 for each of the kParts of a mask, and two waits of the host. No mask is ever written.
//
// Why fast: a warp takes neighbouring columns of a box and goes down them 32 pixels at a time. A vote makes a word of
// bits of the lanes' answers, and the ends of runs are the bits that differ from the one before. They are counted
// first; from the sums of the counts each warp knows where its positions go, in the order of the columns. Computing
// the pixels twice is cheaper than memory for positions of which nobody knows the number.

#include <ATen/core/Tensor.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "masks/masks.h"
#include "masks/rle.h"

namespace refdet {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kParts = 64;  // of the columns of a box, a warp each
constexpr unsigned kAllLanes = 0xffffffffu;

// How a pixel mixes the cells of one axis.
struct Weights {
  int cell, next;
  float lower, upper;
};

// One axis of a box. The _rn functions are never fused into multiply-adds, so every operation rounds as on the CPU.
struct Axis {
  float low, scale, end;
  int64_t first, last;  // the pixels whose centres are in the box

  __device__ Axis(float from, float to, int size, int64_t limit) {
    low = from;
    scale = __double2float_rn(__ddiv_rn(static_cast<double>(size), __dsub_rn(to, from)));
    end = static_cast<float>(size - 1);
    first = pixel(from, limit), last = max(first, pixel(to, limit));
  }

  __device__ static int64_t pixel(float edge, int64_t limit) {
    return static_cast<int64_t>(fmin(fmax(ceil(__dsub_rn(edge, 0.5)), 0.0), static_cast<double>(limit)));
  }

  __device__ Weights at(int64_t pixel) const {
    const float centre = __fadd_rn(__ll2float_rn(pixel), 0.5f);
    const float wanted = __fsub_rn(__fmul_rn(__fsub_rn(centre, low), scale), 0.5f);
    const float position = fminf(fmaxf(wanted, 0.0f), end);
    const int cell = static_cast<int>(position);
    const float lower = __fsub_rn(1.0f, __fsub_rn(position, static_cast<float>(cell)));
    return {cell, min(cell + 1, static_cast<int>(end)), lower, __fsub_rn(1.0f, lower)};
  }
};

__device__ float mix(float a, float b, const Weights& weights) {
  return __fadd_rn(__fmul_rn(a, weights.lower), __fmul_rn(b, weights.upper));
}

__device__ bool inside(const float* cells, int size, const Weights& column, const Weights& row, float threshold) {
  const float* above = cells + int64_t{row.cell} * size;
  const float* below = cells + int64_t{row.next} * size;
  return mix(mix(above[column.cell], above[column.next], column), mix(below[column.cell], below[column.next], column),
             row) >= threshold;
}

// The positions, x * height + y, where the runs of one part of a mask begin and end: how many, or with `turns` written
// there. A part is the columns [begin, end) of its mask; the whole warp takes it.
__device__ int64_t turns_of(const float* cells, int size, const Axis& columns, const Axis& rows, int64_t begin,
                            int64_t end, int64_t height, int64_t width, float threshold, uint32_t* turns) {
  const int lane = threadIdx.x % kWarp;
  const bool gap = rows.first > 0 || rows.last < height;  // background between the columns
  int64_t found = 0;
  unsigned open = 0;  // whether the pixel before belongs to the mask
  if (!gap && begin > columns.first && begin < end)
    open = inside(cells, size, columns.at(begin - 1), rows.at(height - 1), threshold);
  for (int64_t x = begin; x < end; ++x) {
    const Weights column = columns.at(x);
    for (int64_t top = rows.first; top < rows.last; top += kWarp) {
      const int64_t y = top + lane;
      const bool in = y < rows.last && inside(cells, size, column, rows.at(y), threshold);
      const unsigned bits = __ballot_sync(kAllLanes, in);
      const int count = static_cast<int>(min(int64_t{kWarp}, rows.last - top));
      unsigned ends = bits ^ (bits << 1 | open);
      if (count < kWarp) ends &= (1u << count) - 1;
      if (turns != nullptr && ends >> lane & 1u)
        turns[found + __popc(ends & ((1u << lane) - 1))] = static_cast<uint32_t>(x * height + y);
      found += __popc(ends);
      open = bits >> (count - 1) & 1u;
    }
    const int64_t after = x * height + rows.last;
    if (open && (gap || x == columns.last - 1)) {
      open = 0;
      if (after == height * width) continue;  // the end of the image ends the last run
      if (turns != nullptr && lane == 0) turns[found] = static_cast<uint32_t>(after);
      ++found;
    }
  }
  return found;
}

// A warp takes part `warp % kParts` of mask `warp / kParts`. Without `turns` it writes the number of its turns to
// `counts`; with them, `counts` are the sums of these numbers, each including its own.
__global__ void turns_kernel(const float* probabilities, const float* boxes, int64_t n, int size, int64_t height,
                             int64_t width, float threshold, int64_t* counts, uint32_t* turns) {
  const int64_t warp = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp, mask = warp / kParts;
  if (mask >= n) return;
  const float* box = boxes + 4 * mask;
  int64_t found = 0;
  if (isfinite(box[0]) && isfinite(box[1]) && isfinite(box[2]) && isfinite(box[3])) {
    const Axis columns(box[0], box[2], size, width), rows(box[1], box[3], size, height);
    const int64_t part = (columns.last - columns.first + kParts - 1) / kParts;
    const int64_t begin = min(columns.first + warp % kParts * part, columns.last);
    const int64_t end = min(begin + part, columns.last);
    if (turns != nullptr && warp > 0) turns += counts[warp - 1];
    if (rows.first < rows.last)
      found = turns_of(probabilities + mask * size * size, size, columns, rows, begin, end, height, width, threshold,
                       turns);
  }
  if (turns == nullptr && threadIdx.x % kWarp == 0) counts[warp] = found;
}

EncodedMasks masks_to_rle_cuda(const at::Tensor& probabilities, const at::Tensor& boxes, int64_t height, int64_t width,
                               double threshold) {
  check_masks_to_rle(probabilities, boxes, height, width, threshold);
  const int64_t n = probabilities.size(0), blocks = (n * kParts + kThreads / kWarp - 1) / (kThreads / kWarp);
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "masks_to_rle: ", n, " masks are too many");
  at::Tensor ends, turns;  // of each mask the number of turns up to its last; positions
  if (n > 0) {
    const c10::cuda::CUDAGuard guard(boxes.device());
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
    const at::Tensor values = probabilities.to(at::kFloat).contiguous(), corners = boxes.contiguous();
    const auto launch = [&](const at::Tensor& counts, uint32_t* positions) {
      turns_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
          values.const_data_ptr<float>(), corners.const_data_ptr<float>(), n, static_cast<int>(probabilities.size(1)),
          height, width, static_cast<float>(threshold), counts.mutable_data_ptr<int64_t>(), positions);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    const at::Tensor counts = at::empty({n * kParts}, boxes.options().dtype(at::kLong));
    launch(counts, nullptr);
    const at::Tensor sums = counts.cumsum(0);
    ends = sums.view({n, kParts}).select(1, kParts - 1).contiguous().cpu();
    turns = at::empty({ends[n - 1].item<int64_t>()}, boxes.options().dtype(at::kInt));
    if (turns.numel() > 0) launch(sums, reinterpret_cast<uint32_t*>(turns.mutable_data_ptr<int32_t>()));
    turns = turns.cpu();
  }
  const int64_t* end = n > 0 ? ends.const_data_ptr<int64_t>() : nullptr;
  const auto* position = n > 0 ? reinterpret_cast<const uint32_t*>(turns.const_data_ptr<int32_t>()) : nullptr;
  return encode(n, [&](int64_t i) {
    Mask mask(height, width);
    for (int64_t j = i > 0 ? end[i - 1] : 0; j < end[i]; ++j) mask.turn(position[j] / height, position[j] % height);
    mask.finish();
    return mask;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) { m.impl("masks_to_rle", &masks_to_rle_cuda); }

}  // namespace refdet
