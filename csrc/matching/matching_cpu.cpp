// Matching of N candidate boxes to M objects by IoU, on the CPU, one image of a batch after another.
//
// Output: for each candidate its best IoU and the first object that has it (0 and object 0 if it overlaps none), and
// whether it has the highest IoU of all candidates, above 0, with some object. IoU is float32, with every operation
// rounded separately, in the order of `iou` in refdet/structures/boxes.py: (x2-x1)(y2-y1) of both, a + b - overlap, one
// division. If the union is not above 0, or NaN, as with any NaN coordinate, the IoU is 0, so it is never NaN.
//
// Cost: at most 2 N M IoUs, and memory for N + M values and M more per kChunk candidates. The IoU matrix (40 MB for
// 100,000 anchors and 100 objects, and ten times that with its intermediate results) is never stored.
//
// Speed: a tile of candidates is stored as a struct of arrays in the L1 cache, and compared with an object in a
// branchless loop that compilers vectorize. Objects outside the tile's bounding box are skipped: anchors come in rows,
// so most objects are far from most tiles. A second pass finds the candidates with the highest IoU of an object, but
// only in chunks whose own highest IoU is the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "matching/matching.h"

namespace refdet {
namespace {

constexpr int kTile = 64;  // candidates compared with an object at once
constexpr int64_t kChunksPerTask = 8;  // grain size of at::parallel_for
constexpr int64_t kChunk = 256;  // candidates per chunk; the highest IoU with each object is recorded per chunk

struct Box {
  float x1, y1, x2, y2, area;

  explicit Box(const float* box)
      : x1(box[0]), y1(box[1]), x2(box[2]), y2(box[3]), area((box[2] - box[0]) * (box[3] - box[1])) {}
};

// Up to kTile candidates as a struct of arrays, padded with empty boxes, which overlap nothing.
class Tile {
 public:
  Tile(const float* boxes, int count) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    left_ = top_ = kInfinity, right_ = bottom_ = -kInfinity;
    for (int i = 0; i < kTile; ++i) {
      const float none[4] = {};
      const Box box(i < count ? boxes + 4 * i : none);
      x1_[i] = box.x1, y1_[i] = box.y1, x2_[i] = box.x2, y2_[i] = box.y2, area_[i] = box.area;
      if (i >= count) continue;
      // std::min and std::max ignore NaN as their second argument; a candidate with NaN overlaps nothing
      left_ = std::min(left_, box.x1), top_ = std::min(top_, box.y1);
      right_ = std::max(right_, box.x2), bottom_ = std::max(bottom_, box.y2);
    }
  }

  // Whether no candidate can overlap the object. If false, candidates may still have IoU 0, as with a NaN object.
  bool misses(const Box& object) const {
    return object.x1 >= right_ || object.x2 <= left_ || object.y1 >= bottom_ || object.y2 <= top_;
  }

  // Writes the IoU of the object with each of the kTile candidates.
  void iou(const Box& object, float* ious) const {
    for (int i = 0; i < kTile; ++i) {
      const float width = std::max(std::min(x2_[i], object.x2) - std::max(x1_[i], object.x1), 0.0f);
      const float height = std::max(std::min(y2_[i], object.y2) - std::max(y1_[i], object.y1), 0.0f);
      const float overlap = width * height;
      const float union_area = area_[i] + object.area - overlap;
      const float quotient = overlap / std::max(union_area, kMinUnion);
      ious[i] = union_area > 0.0f ? quotient : 0.0f;
    }
  }

 private:
  float x1_[kTile], y1_[kTile], x2_[kTile], y2_[kTile], area_[kTile];
  float left_, top_, right_, bottom_;
};

// Maximum of kTile non-negative values, compared as integers, which sort the same way and have no NaN.
float largest(const float* values) {
  int32_t bits[kTile], max_bits = 0;
  std::memcpy(bits, values, sizeof bits);
  for (int i = 0; i < kTile; ++i) max_bits = std::max(max_bits, bits[i]);
  float value;
  std::memcpy(&value, &max_bits, sizeof value);
  return value;
}

// Compares candidates with all objects: writes their `max_iou` and `object` and updates `object_max` of each object.
void match_tile(const float* candidates, int count, const std::vector<Box>& objects, float* max_iou, int64_t* object,
                float* object_max) {
  const Tile tile(candidates, count);
  float ious[kTile], tile_max[kTile] = {};
  int32_t best_object[kTile] = {};
  for (size_t m = 0; m < objects.size(); ++m) {
    if (tile.misses(objects[m])) continue;
    tile.iou(objects[m], ious);
    const auto index = static_cast<int32_t>(m);
    for (int i = 0; i < kTile; ++i) {
      best_object[i] = ious[i] > tile_max[i] ? index : best_object[i];
      tile_max[i] = ious[i] > tile_max[i] ? ious[i] : tile_max[i];
    }
    object_max[m] = std::max(object_max[m], largest(ious));
  }
  std::copy(tile_max, tile_max + count, max_iou);
  std::copy(best_object, best_object + count, object);
}

// Sets `is_best` of the candidates whose IoU with the object is `object_max`, the highest one of the object.
void mark_tile(const float* candidates, int count, const Box& object, float object_max, bool* is_best) {
  const Tile tile(candidates, count);
  if (tile.misses(object)) return;
  float ious[kTile];
  tile.iou(object, ious);
  for (int i = 0; i < count; ++i) is_best[i] |= ious[i] == object_max;
}

// Matches the n candidates of an image to its objects; `is_best` must be false everywhere before.
void match_image(const float* candidates, int64_t n, const std::vector<Box>& objects, float* max_iou, int64_t* object,
                 bool* is_best) {
  const int64_t m = objects.size(), chunks = (n + kChunk - 1) / kChunk;
  const auto for_each_tile = [n](int64_t chunk, const auto& function) {
    const int64_t end = std::min((chunk + 1) * kChunk, n);
    for (int64_t i = chunk * kChunk; i < end; i += kTile)
      function(i, static_cast<int>(std::min<int64_t>(kTile, end - i)));
  };
  std::vector<float> object_max(m), chunk_max(chunks * m);  // the highest IoU of each object: over all, per chunk
  at::parallel_for(0, chunks, kChunksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for_each_tile(chunk, [&](int64_t i, int count) {
        match_tile(candidates + 4 * i, count, objects, max_iou + i, object + i, chunk_max.data() + chunk * m);
      });
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < m; ++i) object_max[i] = std::max(object_max[i], chunk_max[chunk * m + i]);
  at::parallel_for(0, chunks, kChunksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t i = 0; i < m; ++i) {
        if (!(object_max[i] > 0) || chunk_max[chunk * m + i] != object_max[i]) continue;
        for_each_tile(chunk, [&](int64_t first, int count) {
          mark_tile(candidates + 4 * first, count, objects[i], object_max[i], is_best + first);
        });
      }
  });
}

Matches match_boxes_cpu(const at::Tensor& candidates, const at::Tensor& objects) {
  const MatchSizes sizes = check_match_boxes(candidates, objects);
  const int64_t n = sizes.candidates, m = sizes.objects;
  const at::Tensor flat_candidates = candidates.contiguous(), flat_objects = objects.contiguous();
  const at::Tensor max_iou = match_output(candidates, objects, at::kFloat);
  const at::Tensor object = match_output(candidates, objects, at::kLong);
  const at::Tensor is_best = match_output(candidates, objects, at::kBool);
  for (int64_t image = 0; image < sizes.images; ++image) {
    const float* image_objects = flat_objects.const_data_ptr<float>() + 4 * image * m;
    std::vector<Box> boxes;
    boxes.reserve(m);
    for (int64_t i = 0; i < m; ++i) boxes.emplace_back(image_objects + 4 * i);
    match_image(flat_candidates.const_data_ptr<float>() + 4 * sizes.first_candidate(image), n, boxes,
                max_iou.mutable_data_ptr<float>() + image * n, object.mutable_data_ptr<int64_t>() + image * n,
                is_best.mutable_data_ptr<bool>() + image * n);
  }
  return {max_iou, object, is_best};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("match_boxes", &match_boxes_cpu); }

}  // namespace refdet
