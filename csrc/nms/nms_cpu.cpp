// Greedy non-maximum suppression on the CPU, separately for each image and each group (such as a class) of its boxes.
//
// The boxes of each image are visited by descending score (ties by index, NaN as -inf); a box is kept unless its IoU
// with a kept box of its group exceeds the threshold, until max_keep boxes of the image are kept (negative: no limit).
// The IoU overlap / (area + other area - overlap), with areas (x2 - x1) * (y2 - y1), is computed in float32, each
// operation rounded separately, and compared with the threshold rounded to float32. A NaN IoU (from a NaN coordinate or
// 0/0) suppresses nothing.
//
// Cost: O(N) for the order, and for each visited box at most as many IoUs as boxes of its group are kept, instead of
// N * N in all: with 6000 boxes and 300 to keep, boxes after the 300th kept one are never visited.
//
// Speed: the order is a radix sort of the bits of the scores. The kept boxes of a group are stored in tiles as a struct
// of arrays, so that a candidate is compared with a tile in a branchless loop that compilers vectorize, and without
// division: if overlap / union rounds to more than the threshold t, then overlap > t * union, and, as rounding is
// monotonic, overlap >= t * union as rounded. Division is only needed in tiles with such a box. A candidate is dropped
// at the first tile that suppresses it. Images, which do not depend on each other, are distributed to threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "nms/nms.h"

namespace refdet {
namespace {

constexpr int kTile = 32;            // boxes in a tile
constexpr int64_t kRadixFrom = 200;  // number of boxes from which radix sort is faster than a comparison sort
constexpr int32_t kNone = -1;        // no tile

struct Ranked {
  uint32_t key;    // descending_key of the score
  uint32_t index;  // position of the box among those of its image
};

// A sort key, smaller for a higher score; -0 and +0 are equal.
uint32_t descending_key(float score) {
  if (score != score) score = -std::numeric_limits<float>::infinity();
  score += 0.0f;  // -0 becomes +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  // Bits of positive floats are in the order of the floats, those of negative ones in reverse.
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~ascending;
}

// Stable sort by key; entries come with ascending indices.
void sort_by_key(std::vector<Ranked>& entries) {
  if (static_cast<int64_t>(entries.size()) < kRadixFrom) {
    std::sort(entries.begin(), entries.end(),
              [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; });
    return;
  }
  constexpr int kBits = 11, kPasses = 3;  // 3 * 11 bits cover the 32 of a key
  constexpr uint32_t kBuckets = 1u << kBits;
  std::vector<std::array<uint32_t, kBuckets>> starts(kPasses);  // zeros
  for (const Ranked& entry : entries)
    for (int pass = 0; pass < kPasses; ++pass) ++starts[pass][entry.key >> (pass * kBits) & (kBuckets - 1)];
  std::vector<Ranked> other(entries.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t total = 0;
    for (uint32_t& start : starts[pass]) total += std::exchange(start, total);  // from counts to starts
    for (const Ranked& entry : entries) other[starts[pass][entry.key >> (pass * kBits) & (kBuckets - 1)]++] = entry;
    entries.swap(other);
  }
}

// Maps any ids id(0) to id(n - 1) to slots 0 to count - 1, in ascending order of the ids: slot[i] is that of id(i).
struct Slots {
  std::vector<uint32_t> slot;
  size_t count = 0;

  template <typename Id>
  Slots(size_t n, const Id& id) : slot(n) {
    if (n == 0) return;
    int64_t low = id(0), high = low;
    for (size_t i = 1; i < n; ++i) low = std::min(low, id(i)), high = std::max(high, id(i));
    const uint64_t range = uint64_t(high) - uint64_t(low);  // may not fit into int64
    if (range < 4 * uint64_t{n} + 256) {                    // the usual case; ids that do not occur have unused slots
      for (size_t i = 0; i < n; ++i) slot[i] = static_cast<uint32_t>(uint64_t(id(i)) - uint64_t(low));
      count = range + 1;
      return;
    }
    std::vector<int64_t> sorted(n);
    for (size_t i = 0; i < n; ++i) sorted[i] = id(i);
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    for (size_t i = 0; i < n; ++i)
      slot[i] = static_cast<uint32_t>(std::lower_bound(sorted.begin(), sorted.end(), id(i)) - sorted.begin());
    count = sorted.size();
  }
};

float area_of(const float* box) { return (box[2] - box[0]) * (box[3] - box[1]); }

// Up to kTile kept boxes of one group as a struct of arrays, padded with NaN boxes: with a NaN area, they suppress
// nothing. Tiles of a group are linked by their indices in `Kept::pool_`.
struct Tile {
  float x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];
  int32_t size = 0, next = kNone;

  Tile() {
    for (auto* field : {x1, y1, x2, y2, area}) std::fill(field, field + kTile, std::numeric_limits<float>::quiet_NaN());
  }

  void add(const float* box, float box_area) {
    x1[size] = box[0], y1[size] = box[1], x2[size] = box[2], y2[size] = box[3];
    area[size++] = box_area;
  }

  // Whether the IoU of `box` with a box of the tile exceeds `threshold`.
  bool suppresses(const float* box, float box_area, float threshold) const {
    const float bx1 = box[0], by1 = box[1], bx2 = box[2], by2 = box[3];
    float overlaps[kTile], unions[kTile];
    int32_t possible = 0;  // whether some IoU may exceed the threshold; an integer, without branches, to be vectorized
    for (int i = 0; i < kTile; ++i) {
      const float width = std::max(std::min(bx2, x2[i]) - std::max(bx1, x1[i]), 0.0f);
      const float height = std::max(std::min(by2, y2[i]) - std::max(by1, y1[i]), 0.0f);
      overlaps[i] = width * height;
      unions[i] = box_area + area[i] - overlaps[i];
      possible |= static_cast<int32_t>(overlaps[i] >= threshold * unions[i]) & static_cast<int32_t>(overlaps[i] > 0.0f);
    }
    if (!possible) return false;
    int32_t hit = 0;
    for (int i = 0; i < kTile; ++i) hit |= overlaps[i] / unions[i] > threshold;
    return hit;
  }
};

// Kept boxes of one image: a linked list of tiles per group; all tiles are in one pool.
class Kept {
 public:
  explicit Kept(size_t groups) : chains_(groups) {}

  // Adds the box unless a kept box of its group suppresses it; returns whether it did.
  bool add(uint32_t group, const float* box, float threshold) {
    Chain& chain = chains_[group];
    const float area = area_of(box);
    for (int32_t tile = chain.first; tile != kNone; tile = pool_[tile].next)
      if (pool_[tile].suppresses(box, area, threshold)) return false;
    if (chain.last == kNone || pool_[chain.last].size == kTile) {
      const auto tile = static_cast<int32_t>(pool_.size());
      pool_.emplace_back();
      (chain.last == kNone ? chain.first : pool_[chain.last].next) = tile;
      chain.last = tile;
    }
    pool_[chain.last].add(box, area);
    return true;
  }

 private:
  struct Chain {
    int32_t first = kNone, last = kNone;
  };
  std::vector<Chain> chains_;
  std::vector<Tile> pool_;
};

// Indices of the kept boxes of one image, best first; `members` are the indices of all its boxes, ascending.
// If `groups` is null, all boxes are in one group.
std::vector<int64_t> nms_of_image(const float* boxes, const float* scores, const int64_t* groups,
                                  const std::vector<uint32_t>& members, int64_t max_keep, float threshold) {
  const size_t n = members.size();
  const size_t limit = max_keep < 0 ? n : static_cast<size_t>(std::min<int64_t>(max_keep, n));
  std::vector<int64_t> kept;
  if (limit == 0) return kept;
  kept.reserve(limit);
  std::vector<Ranked> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = {descending_key(scores[members[i]]), static_cast<uint32_t>(i)};
  sort_by_key(order);
  const std::optional<Slots> slots =
      groups ? std::optional<Slots>(std::in_place, n, [&](size_t i) { return groups[members[i]]; }) : std::nullopt;
  Kept kept_boxes(slots ? slots->count : 1);
  for (const Ranked& entry : order) {
    const uint32_t index = members[entry.index];
    if (!kept_boxes.add(slots ? slots->slot[entry.index] : 0, boxes + 4 * int64_t{index}, threshold)) continue;
    kept.push_back(index);
    if (kept.size() == limit) break;
  }
  return kept;
}

// Indices of the boxes of each image, ascending; the images are in the order of their ids. If `images` is null, all
// boxes are of one image.
std::vector<std::vector<uint32_t>> members_by_image(const int64_t* images, int64_t n) {
  if (!images) {
    std::vector<std::vector<uint32_t>> all(1, std::vector<uint32_t>(n));
    for (int64_t i = 0; i < n; ++i) all[0][i] = static_cast<uint32_t>(i);
    return all;
  }
  const Slots slots(n, [&](size_t i) { return images[i]; });
  std::vector<std::vector<uint32_t>> members(slots.count);
  for (int64_t i = 0; i < n; ++i) members[slots.slot[i]].push_back(static_cast<uint32_t>(i));
  return members;
}

// Indices of the kept boxes of each image, best first. `members_of(images, n)` lists the boxes of each image, like
// `members_by_image`.
template <typename Members>
std::vector<std::vector<int64_t>> nms_by_image(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold,
                                               int64_t max_keep, const std::optional<at::Tensor>& groups,
                                               const std::optional<at::Tensor>& images, const Members& members_of) {
  const int64_t n = boxes.size(0);
  TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "nms: too many boxes: ", n);
  const at::Tensor flat_boxes = boxes.contiguous(), flat_scores = scores.contiguous();
  const at::Tensor flat_groups = groups ? groups->contiguous() : at::Tensor();
  const at::Tensor flat_images = images ? images->contiguous() : at::Tensor();
  const float* box = flat_boxes.const_data_ptr<float>();
  const float* score = flat_scores.const_data_ptr<float>();
  const int64_t* group = groups ? flat_groups.const_data_ptr<int64_t>() : nullptr;
  const auto threshold = static_cast<float>(iou_threshold);

  const std::vector<std::vector<uint32_t>> members =
      members_of(images ? flat_images.const_data_ptr<int64_t>() : nullptr, n);
  std::vector<std::vector<int64_t>> kept(members.size());
  at::parallel_for(0, static_cast<int64_t>(members.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kept[i] = nms_of_image(box, score, group, members[i], max_keep, threshold);
  });
  return kept;
}

at::Tensor nms_cpu(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold, int64_t max_keep,
                   const std::optional<at::Tensor>& groups, const std::optional<at::Tensor>& images) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  const auto kept = nms_by_image(boxes, scores, iou_threshold, max_keep, groups, images, members_by_image);
  int64_t total = 0;
  for (const auto& indices : kept) total += static_cast<int64_t>(indices.size());
  at::Tensor result = at::empty({total}, boxes.options().dtype(at::kLong));
  auto* out = result.mutable_data_ptr<int64_t>();
  for (const auto& indices : kept) out = std::copy(indices.begin(), indices.end(), out);
  return result;
}

std::tuple<at::Tensor, at::Tensor> nms_padded_cpu(const at::Tensor& boxes, const at::Tensor& scores,
                                                  double iou_threshold, int64_t max_keep, const at::Tensor& images,
                                                  int64_t num_images, const std::optional<at::Tensor>& groups) {
  check_nms(boxes, scores, iou_threshold, groups, images);
  check_nms_padded(max_keep, num_images);
  // Boxes of images other than 0 to num_images - 1 are left out.
  const auto members_of_image = [num_images](const int64_t* image, int64_t n) {
    std::vector<std::vector<uint32_t>> members(num_images);
    for (int64_t i = 0; i < n; ++i)
      if (image[i] >= 0 && image[i] < num_images) members[image[i]].push_back(static_cast<uint32_t>(i));
    return members;
  };
  const auto kept_of_image = nms_by_image(boxes, scores, iou_threshold, max_keep, groups, images, members_of_image);
  const at::Tensor kept = at::full({num_images, max_keep}, -1, boxes.options().dtype(at::kLong));
  const at::Tensor kept_counts = at::empty({num_images}, kept.options());
  for (int64_t i = 0; i < num_images; ++i) {
    std::copy(kept_of_image[i].begin(), kept_of_image[i].end(), kept.mutable_data_ptr<int64_t>() + i * max_keep);
    kept_counts.mutable_data_ptr<int64_t>()[i] = static_cast<int64_t>(kept_of_image[i].size());
  }
  return {kept, kept_counts};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) {
  m.impl("nms", &nms_cpu);
  m.impl("nms_padded", &nms_padded_cpu);
}

}  // namespace refdet
