// Greedy non-maximum suppression on the CPU.
//
// What: boxes are visited from the best score down (equal scores: the lower index first; NaN counts as -inf); one is
// kept unless its IoU with a box kept before it exceeds the threshold, until max_keep are kept (negative: no limit).
// IoU is float32, each operation rounded on its own: ((x2-x1)(y2-y1) both ways, a + b - overlap, one division), and
// is compared with the threshold rounded to float32. A NaN IoU (a NaN coordinate, 0/0) suppresses nothing.
//
// Cost: O(N log N) for the order and at most visited * kept IoUs, where the usual kernel does visited * N: of 6000
// boxes with 300 to keep, all that come after the 300th survivor are never looked at.
//
// Why fast: the kept boxes stand in five flat arrays, so that comparing a candidate with a tile of them is one loop
// without branches, which compilers turn into SIMD; a candidate is dropped after the first tile with a hit. The order
// is one sort of integers: score in the high half, index in the low half, so it needs no stable sort.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "nms.h"

namespace refdet {
namespace {

constexpr int64_t kTile = 64;

// A key that is smaller for a better score; -0 and +0 are the same score.
uint32_t descending_key(float score) {
  if (score != score) score = -std::numeric_limits<float>::infinity();
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

std::vector<uint64_t> best_first(const float* scores, int64_t n) {
  std::vector<uint64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = uint64_t{descending_key(scores[i])} << 32 | uint64_t(i);
  std::sort(order.begin(), order.end());
  return order;
}

// The kept boxes, field by field, padded with NaN boxes to whole tiles: those have no IoU with anything.
class Kept {
 public:
  bool suppress(const float* box, float threshold) const {
    const float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3], area = (x2 - x1) * (y2 - y1);
    for (int64_t tile = 0; tile < size_; tile += kTile) {
      const float *kx1 = &x1_[tile], *ky1 = &y1_[tile], *kx2 = &x2_[tile], *ky2 = &y2_[tile], *karea = &area_[tile];
      int hit = 0;
      for (int64_t i = 0; i < kTile; ++i) {
        const float width = std::max(std::min(x2, kx2[i]) - std::max(x1, kx1[i]), 0.0f);
        const float height = std::max(std::min(y2, ky2[i]) - std::max(y1, ky1[i]), 0.0f);
        const float overlap = width * height;
        hit |= overlap / (area + karea[i] - overlap) > threshold;
      }
      if (hit) return true;
    }
    return false;
  }

  void add(const float* box) {
    if (size_ % kTile == 0) {
      for (auto* field : {&x1_, &y1_, &x2_, &y2_, &area_})
        field->resize(size_ + kTile, std::numeric_limits<float>::quiet_NaN());
    }
    x1_[size_] = box[0], y1_[size_] = box[1], x2_[size_] = box[2], y2_[size_] = box[3];
    area_[size_++] = (box[2] - box[0]) * (box[3] - box[1]);
  }

 private:
  std::vector<float> x1_, y1_, x2_, y2_, area_;
  int64_t size_ = 0;
};

at::Tensor nms_cpu(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep) {
  check_nms(boxes, scores, iou_threshold);
  const int64_t n = boxes.size(0);
  TORCH_CHECK(n <= int64_t{std::numeric_limits<uint32_t>::max()}, "nms: ", n, " boxes are too many");
  const at::Tensor flat_boxes = boxes.contiguous(), flat_scores = scores.contiguous();
  const float* box = flat_boxes.const_data_ptr<float>();
  const auto limit = static_cast<size_t>(max_keep < 0 ? n : std::min(max_keep, n));
  const auto threshold = static_cast<float>(iou_threshold);

  Kept kept;
  std::vector<int64_t> indices;
  indices.reserve(limit);
  for (const uint64_t entry : best_first(flat_scores.const_data_ptr<float>(), n)) {
    if (indices.size() == limit) break;
    const auto index = static_cast<int64_t>(entry & 0xffffffffu);
    if (kept.suppress(box + 4 * index, threshold)) continue;
    kept.add(box + 4 * index);
    indices.push_back(index);
  }
  at::Tensor result = at::empty({static_cast<int64_t>(indices.size())}, boxes.options().dtype(at::kLong));
  std::copy(indices.begin(), indices.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("nms", &nms_cpu); }

}  // namespace refdet
