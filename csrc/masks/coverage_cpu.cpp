// Fraction of each cell of a box that an object's mask covers, from COCO's compressed RLE, on the CPU.
//
// The integral image T(y, x) of a mask, its number of pixels above y and left of x, interpolated linearly between pixel
// corners, is evaluated at the (m + 1)^2 corners of a box's cells; a difference of four values is the covered area,
// which is divided by the area of the cell. Pixel counts are integers, so their order does not matter; the rest is
// float64, with each operation rounded separately, in the order of mask_coverage_plain in refdet/ops/masks.py. A box
// that is empty or has a coordinate that is not finite gets 0.
//
// Cost: the runs of the referenced objects, once, and for each box the runs up to its right edge and 2 (m + 1)^2 steps.
// Neither the mask nor T is stored.
//
// Speed: the contribution of the columns up to x to T at the m + 1 heights of the corners follows from the number of
// runs that begin and end between two heights and the sum of those rows: a run updates two bins, whatever its length,
// and the bins are summed only at the columns of corners. Boxes are distributed to threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "masks/masks.h"

namespace refdet {
namespace {

constexpr int64_t kBoxesPerTask = 4;

// Pixels [top, bottom) of column x that belong to the mask.
struct Run {
  uint32_t x, top, bottom;
};

// The runs of a mask, split at the ends of columns. If the string is invalid, sets `error` to what is wrong, and the
// runs are meaningless. `RleString` in rle_cpu.cpp describes the encoding.
std::vector<Run> runs_of(const uint8_t* text, const uint8_t* end, int64_t height, int64_t width, const char*& error) {
  std::vector<Run> runs;
  const int64_t pixels = height * width;
  int64_t position = 0, older = 0, newer = 0;
  for (int64_t index = 0; text != end; ++index) {
    int64_t count = 0;
    int shift = 0;
    uint8_t code;
    do {
      code = static_cast<uint8_t>(*text++ - '0');
      if (code > 63 || shift > 30 || (code & 32 && text == end)) {
        error = "is not valid RLE";
        return {};
      }
      count |= int64_t{code & 31} << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) count -= int64_t{1} << shift;
    if (index > 2) count += older;
    older = newer, newer = count;
    if (count < 0 || count > pixels - position) {
      error = "does not match its image size";
      return {};
    }
    if (index % 2 == 1 && count > 0) {
      int64_t x = position / height, top = position % height;
      for (int64_t left = count; left > 0; ++x, top = 0) {
        const int64_t bottom = std::min(height, top + left);
        runs.push_back({static_cast<uint32_t>(x), static_cast<uint32_t>(top), static_cast<uint32_t>(bottom)});
        left -= bottom - top;
      }
    }
    position += count;
  }
  if (position != pixels) error = "does not match its image size";
  return runs;
}

// The pixels that contain the m + 1 cell edges of a box along one axis, and the position of each edge in its pixel.
struct Edges {
  std::vector<int64_t> pixel;
  std::vector<double> fraction;

  Edges(double low, double high, int64_t size, int64_t limit) : pixel(size + 1), fraction(size + 1) {
    for (int64_t i = 0; i <= size; ++i) {
      const double position = low + (high - low) * (static_cast<double>(i) / static_cast<double>(size));
      const double inside = std::min(std::max(position, 0.0), static_cast<double>(limit));
      const double floor = std::min(std::floor(inside), static_cast<double>(limit - 1));
      pixel[i] = static_cast<int64_t>(floor);
      fraction[i] = inside - floor;
    }
  }
};

// Sums over the runs added so far, from which `read` computes T at the heights of the edges.
class Bins {
 public:
  Bins(const Edges& edges, int64_t height)
      : edges_(edges), bin_(height + 1), balance_(edges.pixel.size() + 1), rows_(edges.pixel.size() + 1) {
    int64_t row = 0;
    for (size_t i = 0; i < edges.pixel.size(); ++i) {
      while (row <= edges.pixel[i]) bin_[row++] = static_cast<uint32_t>(i);
    }
    while (row <= height) bin_[row++] = static_cast<uint32_t>(edges.pixel.size());
  }

  void add(const Run& run) {
    const uint32_t top = bin_[run.top], bottom = bin_[run.bottom];
    balance_[top] += 1, rows_[top] += run.top;
    balance_[bottom] -= 1, rows_[bottom] -= run.bottom;
  }

  // Writes T at the height y of each edge. A run that begins above y adds y - top, and one that ends above y subtracts
  // y - bottom. So T is y times the runs that begin but do not end above y, minus the tops, plus the bottoms.
  void read(std::vector<double>& heights) const {
    int64_t runs = 0, rows = 0;
    for (size_t i = 0; i < edges_.pixel.size(); ++i) {
      runs += balance_[i], rows += rows_[i];
      const int64_t above = edges_.pixel[i] * runs - rows;
      const double fraction = edges_.fraction[i];
      heights[i] = static_cast<double>(above) * (1 - fraction) + static_cast<double>(above + runs) * fraction;
    }
  }

 private:
  const Edges& edges_;
  std::vector<uint32_t> bin_;            // per row: the first edge in it or below
  std::vector<int64_t> balance_, rows_;  // per bin: starts minus ends, and the sum of their rows
};

// Writes the covered fraction (m, m) of each cell of a box; m is `size`.
void compute_coverage(const std::vector<Run>& runs, const double* box, int64_t size, int64_t height, int64_t width,
                      float* coverage) {
  const Edges xs(box[0], box[2], size, width), ys(box[1], box[3], size, height);
  Bins bins(ys, height);
  std::vector<double> left(size + 1), right(size + 1), corners((size + 1) * (size + 1));
  int64_t column = -1;  // `left` and `right` are T at the left and right side of this column of pixels
  size_t next = 0;
  for (int64_t i = 0; i <= size; ++i) {
    const int64_t x = xs.pixel[i];
    if (x != column) {
      while (next < runs.size() && runs[next].x < x) bins.add(runs[next++]);
      bins.read(left);
      while (next < runs.size() && runs[next].x == x) bins.add(runs[next++]);
      bins.read(right);
      column = x;
    }
    const double fraction = xs.fraction[i];
    double* corner = &corners[i * (size + 1)];
    for (int64_t j = 0; j <= size; ++j) corner[j] = left[j] * (1 - fraction) + right[j] * fraction;
  }
  const double cells = static_cast<double>(size * size);
  const double cell_area = std::max((box[2] - box[0]) * (box[3] - box[1]) / cells, 1e-12);
  for (int64_t y = 0; y < size; ++y) {
    for (int64_t x = 0; x < size; ++x) {
      const double* before = &corners[x * (size + 1) + y];
      const double* after = before + size + 1;
      const double covered = (after[1] - after[0]) - (before[1] - before[0]);
      coverage[y * size + x] = static_cast<float>(std::min(std::max(covered / cell_area, 0.0), 1.0));
    }
  }
}

// Whether the box is not empty and its edges are finite in float32, the type of stored boxes.
bool has_area(const double* box) {
  constexpr double max_edge = std::numeric_limits<float>::max();
  return std::all_of(box, box + 4, [](double edge) { return std::abs(edge) <= max_edge; }) && box[0] < box[2] &&
         box[1] < box[3];
}

at::Tensor mask_coverage_cpu(const at::Tensor& counts, const at::Tensor& starts, int64_t height, int64_t width,
                             const at::Tensor& boxes, const at::Tensor& objects, int64_t size) {
  check_mask_coverage(counts, starts, height, width, boxes, objects, size);
  const int64_t n = boxes.size(0), masks = starts.size(0) - 1;
  const at::Tensor flat_counts = counts.contiguous(), flat_starts = starts.contiguous();
  const at::Tensor flat_boxes = boxes.contiguous(), flat_objects = objects.contiguous();
  const auto* text = flat_counts.const_data_ptr<uint8_t>();
  const auto* start = flat_starts.const_data_ptr<int64_t>();
  const auto* box = flat_boxes.const_data_ptr<double>();
  const auto* object = flat_objects.const_data_ptr<int64_t>();
  TORCH_CHECK(start[0] >= 0 && std::is_sorted(start, start + masks + 1) && start[masks] <= counts.size(0),
              "mask_coverage: starts must ascend within the ", counts.size(0), " bytes of counts");
  std::vector<uint8_t> referenced(masks);
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK(object[i] >= 0 && object[i] < masks, "mask_coverage: there is no object ", object[i], " among ", masks);
    referenced[object[i]] = 1;
  }

  std::vector<std::vector<Run>> runs(masks);
  std::vector<const char*> errors(masks, nullptr);
  at::parallel_for(0, masks, kBoxesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (referenced[i]) runs[i] = runs_of(text + start[i], text + start[i + 1], height, width, errors[i]);
    }
  });
  for (int64_t i = 0; i < masks; ++i) {
    TORCH_CHECK_VALUE(errors[i] == nullptr, "mask_coverage: mask ", i, " ", errors[i], " of ", height, " x ", width,
                      " pixels");
  }
  const at::Tensor coverage = at::zeros({n, size, size}, boxes.options().dtype(at::kFloat));
  auto* cells = coverage.mutable_data_ptr<float>();
  at::parallel_for(0, n, kBoxesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (has_area(box + 4 * i))
        compute_coverage(runs[object[i]], box + 4 * i, size, height, width, cells + i * size * size);
    }
  });
  return coverage;
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("mask_coverage", &mask_coverage_cpu); }

}  // namespace refdet
