// Greedy non-maximum suppression of several images and groups on the GPU, with the output of nms_cpu.cpp, bit for bit.
//
// The boxes are first sorted by image and score; from then on a box is its index in that order.
//
// Cost: the sorts, half the IoUs of all pairs of visited boxes of an image, and 8 kRows N / 64 bytes.
//
// Speed: the boxes of each image are processed in slabs of kRows, of all images at once. For each slab one kernel
// computes in parallel which later boxes each box would suppress, one bit per pair, without the IoU of pairs of
// different groups. Then one block per image scans its slab, 64 boxes at a time: one thread resolves those among
// themselves on bits in shared memory, and all threads remove what the survivors suppress. The host synchronizes once
// for the sizes of the images, if there are several, and once for the result; the blocks of an image that has max_keep
// boxes return at once. Slabs also bound the memory: 100,000 boxes take 25 MB instead of 1.25 GB.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "nms/nms.h"

namespace refdet {
namespace {

using Bits = unsigned long long;
constexpr int kWord = 64;           // boxes in a word of bits, and threads in a block of suppress_kernel
constexpr int64_t kRows = 32 * 64;  // boxes of an image in a slab
constexpr int kScanThreads = 512;

// Start of the boxes and of the words of bits of each image: no word is shared by two images.
struct Images {
  const int64_t* first_box;   // of each image, and one more
  const int64_t* first_word;  // likewise
  const int64_t* of_word;     // the image of each word
};

// The _rn functions are never fused into multiply-adds, so that rounding is as on the CPU.
__device__ float area_of(float4 box) { return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y)); }

__device__ bool suppresses(float4 a, float4 b, float area_a, float area_b, float threshold) {
  const float width = fmaxf(__fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)), 0.0f);
  const float overlap = __fmul_rn(width, height);
  return __fdiv_rn(overlap, __fsub_rn(__fadd_rn(area_a, area_b), overlap)) > threshold;
}

// Bit j of bits[row - first_row][word] says whether box `row` suppresses the later box 64 * word + j, both counted
// within the image. A block does 64 rows and one word; words before the diagonal are left as they are and never read.
__global__ void suppress_kernel(const float4* boxes, const int64_t* groups, Images images, int64_t words,
                                int64_t first_row, float threshold, int64_t limit, const int64_t* counts, Bits* bits) {
  const int64_t global_word = blockIdx.x, image = images.of_word[global_word];
  if (counts[image] >= limit) return;
  const int64_t begin = images.first_box[image], n = images.first_box[image + 1] - begin;
  const int64_t word = global_word - images.first_word[image], row_word = first_row / kWord + blockIdx.y;
  if (word < row_word) return;  // also where the image has no such row
  __shared__ float4 others[kWord];
  __shared__ float areas[kWord];
  __shared__ int64_t other_groups[kWord];
  const int columns = static_cast<int>(min(static_cast<int64_t>(kWord), n - word * kWord));
  const int thread = threadIdx.x;
  if (thread < columns) {
    others[thread] = boxes[begin + word * kWord + thread];
    areas[thread] = area_of(others[thread]);
    other_groups[thread] = groups ? groups[begin + word * kWord + thread] : 0;
  }
  __syncthreads();
  const int64_t row = row_word * kWord + thread;
  if (row >= n) return;
  const float4 box = boxes[begin + row];
  const float area = area_of(box);
  const int64_t group = groups ? groups[begin + row] : 0;
  Bits found = 0;
  for (int j = word == row_word ? thread + 1 : 0; j < columns; ++j) {
    if (other_groups[j] == group && suppresses(box, others[j], area, areas[j], threshold)) found |= Bits{1} << j;
  }
  bits[(row - first_row) * words + global_word] = found;
}

// Scans the boxes of one slab in order, one block per image. `removed` (a bit per box), `kept` (a byte per box) and
// `counts` (boxes kept of each image) carry over to the next slab.
__global__ void scan_kernel(const Bits* bits, Images images, int64_t words, int64_t first_row, int64_t limit,
                            Bits* removed, bool* kept, int64_t* counts) {
  __shared__ Bits own[kWord];
  __shared__ Bits survivors;
  const int thread = threadIdx.x;
  const int64_t image = blockIdx.x, begin = images.first_box[image], n = images.first_box[image + 1] - begin;
  const int64_t first_word = images.first_word[image], end_word = images.first_word[image + 1];
  const int64_t end_row = min(first_row + kRows, n);
  int64_t total = counts[image];
  for (int64_t start = first_row; start < end_row && total < limit; start += kWord) {
    const int64_t word = first_word + start / kWord;
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
        kept[begin + start + i] = true;
        ++next;
      }
      survivors = alive;
    }
    __syncthreads();
    const Bits alive = survivors;
    total += __popcll(alive);
    for (int64_t later = word + 1 + thread; later < end_word; later += blockDim.x) {
      Bits gone = removed[later];
      for (Bits left = alive; left; left &= left - 1) gone |= slab[(__ffsll(left) - 1) * words + later];
      removed[later] = gone;
    }
    __syncthreads();
  }
  if (thread == 0) counts[image] = total;
}

// The visiting order: by image, then by descending score, then by index.
at::Tensor visiting_order(const at::Tensor& scores, const std::optional<at::Tensor>& images) {
  const at::Tensor known = scores.masked_fill(scores.isnan(), -std::numeric_limits<double>::infinity());
  const at::Tensor order = std::get<1>(at::sort(known, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  if (!images) return order;
  const at::Tensor own = images->index_select(0, order);
  return order.index_select(0, std::get<1>(at::sort(own, /*stable=*/true, /*dim=*/0, /*descending=*/false)));
}

// Number of boxes of each image, in the order of visiting_order.
std::vector<int64_t> image_sizes(const std::optional<at::Tensor>& images, const at::Tensor& order) {
  if (!images) return {order.size(0)};
  const auto [ids, places, sizes] = at::unique_consecutive(images->index_select(0, order), false, true);
  const at::Tensor known = sizes.cpu();
  return {known.const_data_ptr<int64_t>(), known.const_data_ptr<int64_t>() + known.size(0)};
}

at::Tensor nms_cuda(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep,
                    const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = boxes.size(0), limit = max_keep < 0 ? n : std::min(max_keep, n);
  const auto integers = boxes.options().dtype(at::kLong);
  if (limit == 0) return at::empty({0}, integers);

  const at::Tensor order = visiting_order(scores, images);
  const std::vector<int64_t> sizes = image_sizes(images, order);
  const auto count = static_cast<int64_t>(sizes.size());
  const int64_t largest = *std::max_element(sizes.begin(), sizes.end());
  std::vector<int64_t> plan{0};  // first_box, first_word and of_word of Images, one after the other
  for (const int64_t size : sizes) plan.push_back(plan.back() + size);
  plan.push_back(0);
  for (const int64_t size : sizes) plan.push_back(plan.back() + (size + kWord - 1) / kWord);
  const int64_t words = plan.back();
  for (int64_t image = 0; image < count; ++image) plan.insert(plan.end(), (sizes[image] + kWord - 1) / kWord, image);
  const auto places = static_cast<int64_t>(plan.size());
  at::Tensor plan_on_host = at::empty({places}, integers.device(at::kCPU));
  std::copy(plan.begin(), plan.end(), plan_on_host.mutable_data_ptr<int64_t>());
  const at::Tensor plan_on_device = plan_on_host.to(boxes.device());
  const int64_t* plan_at = plan_on_device.const_data_ptr<int64_t>();
  const Images layout{plan_at, plan_at + count + 1, plan_at + 2 * (count + 1)};

  const at::Tensor sorted = boxes.index_select(0, order).contiguous();
  const at::Tensor sorted_groups = groups ? groups->index_select(0, order).contiguous() : at::Tensor();
  const int64_t rows = std::min(kRows, (largest + kWord - 1) / kWord * kWord);
  const at::Tensor bits = at::empty({rows, words}, integers), removed = at::zeros({words}, integers);
  const at::Tensor counts = at::zeros({count}, integers), kept = at::zeros({n}, boxes.options().dtype(at::kBool));
  auto* bits_at = reinterpret_cast<Bits*>(bits.mutable_data_ptr<int64_t>());
  auto* removed_at = reinterpret_cast<Bits*>(removed.mutable_data_ptr<int64_t>());
  auto* counts_at = counts.mutable_data_ptr<int64_t>();
  const auto* sorted_at = reinterpret_cast<const float4*>(sorted.const_data_ptr<float>());
  const int64_t* groups_at = groups ? sorted_groups.const_data_ptr<int64_t>() : nullptr;
  const auto threshold = static_cast<float>(iou_threshold);

  for (int64_t first = 0; first < largest; first += kRows) {
    const int64_t slab_rows = std::min(kRows, largest - first);
    const dim3 grid(static_cast<unsigned>(words), static_cast<unsigned>((slab_rows + kWord - 1) / kWord));
    suppress_kernel<<<grid, kWord, 0, stream>>>(sorted_at, groups_at, layout, words, first, threshold,
                                                limit, counts_at, bits_at);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    scan_kernel<<<static_cast<unsigned>(count), kScanThreads, 0, stream>>>(
        bits_at, layout, words, first, limit, removed_at, kept.mutable_data_ptr<bool>(), counts_at);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return order.index_select(0, kept.nonzero().squeeze(1));
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CUDA, m) { m.impl("nms", &nms_cuda); }

}  // namespace refdet
