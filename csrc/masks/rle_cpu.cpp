// Pastes mask probabilities of boxes into the image as COCO's compressed RLE, on the CPU.
//
// A pixel whose center is in the box is interpolated bilinearly from the values at the centers of the m x m cells of
// the box, and is in the mask if the result reaches the threshold. Every operation is float32 and rounded separately,
// in the order of masks_to_rle_plain in refdet/ops/masks.py: along x first, then along y, each time lower * (1 - f) +
// upper * (1 - (1 - f)). The mask is scanned column by column, as in COCO, and only the ends of its runs are computed:
// no pixel outside the box is visited, and no mask is stored. A box with a coordinate that is not finite has an empty
// mask.
//
// Cost: for a box of w x h pixels, w m interpolations along x, and along y one per pixel between two cells that are not
// clearly both inside or both outside: about w plus the length of the outline times h / m, instead of w h.
//
// Speed: within a column, pixels between two cell centers have values between theirs. If both are above the threshold
// or both below it, by more than rounding errors, all of these pixels are decided at once. Interpolation and decision
// are branchless loops over the m cells of a column that compilers vectorize. Masks are distributed to threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "masks/masks.h"

namespace refdet {
namespace {

constexpr int64_t kMasksPerTask = 4;

// COCO's string: each count in groups of five bits, lowest first, as characters from '0' on; the sixth bit is set if
// more follow. From the fourth count on, the difference to the count two before is encoded.
class Counts {
 public:
  void add(int64_t count) {
    int64_t left = added_ > 2 ? count - older_ : count;
    ++added_, older_ = newer_, newer_ = count;
    bool more = true;
    while (more) {
      int64_t group = left & 31;
      left >>= 5;  // keeps the sign
      more = group & 16 ? left != -1 : left != 0;
      if (more) group |= 32;
      text_.push_back(static_cast<uint8_t>(group + '0'));
    }
  }
  std::vector<uint8_t> take_text() { return std::move(text_); }

 private:
  std::vector<uint8_t> text_;
  int64_t added_ = 0, older_ = 0, newer_ = 0;  // number of counts so far, and the last two
};

// A mask under construction, column by column, as alternating runs of background and foreground, background first.
class Mask {
 public:
  Mask(int64_t height, int64_t width) : height_(height), pixels_(height * width) {}

  // Whether the current run is foreground.
  bool open() const { return open_; }

  // Ends the current run before pixel (x, y); y may be the height, which is the top of the next column.
  void end_run(int64_t x, int64_t y) {
    const int64_t position = x * height_ + y;
    counts_.add(position - position_);
    position_ = position;
    open_ = !open_;
  }

  // Ends the current run before pixel (x, y) if it is foreground. At the end of the image, finish() ends it instead.
  void close_run(int64_t x, int64_t y) {
    if (open_ && x * height_ + y < pixels_) end_run(x, y);
  }

  std::vector<uint8_t> finish() {
    counts_.add(pixels_ - position_);
    return counts_.take_text();
  }

 private:
  Counts counts_;
  int64_t height_, pixels_, position_ = 0;  // position_: first pixel of the current run, in column order
  bool open_ = false;
};

// The pixels along one axis whose centers are in the box, and the two cells between which each is interpolated.
struct Axis {
  int64_t first = 0, last = 0;      // pixels [first, last)
  std::vector<int32_t> cell;        // of each pixel, the first of its two cells; the second is the next, if any
  std::vector<float> lower, upper;  // of each pixel, the weights of the first and of the second cell

  // `low` and `high` are the edges of the box, `size` is m, `limit` is the number of pixels of the image.
  Axis(float low, float high, int64_t size, int64_t limit) {
    const auto pixel = [limit](float edge) {
      return static_cast<int64_t>(std::min(std::max(std::ceil(double{edge} - 0.5), 0.0), static_cast<double>(limit)));
    };
    first = pixel(low), last = std::max(first, pixel(high));
    const auto count = static_cast<size_t>(last - first);
    cell.resize(count), lower.resize(count), upper.resize(count);
    const auto scale = static_cast<float>(static_cast<double>(size) / (double{high} - double{low}));
    const auto end = static_cast<float>(size - 1);
    for (size_t i = 0; i < count; ++i) {
      const float center = static_cast<float>(first + static_cast<int64_t>(i)) + 0.5f;
      const float position = std::min(std::max((center - low) * scale - 0.5f, 0.0f), end);
      cell[i] = static_cast<int32_t>(position);
      lower[i] = 1.0f - (position - static_cast<float>(cell[i]));
      upper[i] = 1.0f - lower[i];
    }
  }
};

// Whether a value is so far above or below the threshold that pixels between two such values are surely inside or
// outside, whatever their weights: rounding changes an interpolated value by less than 2^-21 of it, or 2^-140 if it is
// denormal.
struct Verdict {
  enum : uint8_t { kUnclear = 0, kInside = 1, kOutside = 2 };
  float threshold, surely_inside, surely_outside;

  explicit Verdict(float t)
      : threshold(t), surely_inside(t * (1 + 0x1p-20f) + 0x1p-100f), surely_outside(t * (1 - 0x1p-20f) - 0x1p-100f) {}

  uint8_t operator()(float value) const {
    const int inside = (value >= surely_inside) & (value <= std::numeric_limits<float>::max());
    const int outside = (value >= 0.0f) & (value <= surely_outside);
    return static_cast<uint8_t>(inside * kInside | outside * kOutside);
  }
};

// Adds the runs of a box to `mask`; `cells` has the probabilities (m, m) of its cells column by column, `size` is m.
void draw(const float* cells, int32_t size, const Axis& columns, const Axis& rows, int64_t height,
          const Verdict& verdict, Mask& mask) {
  // Rows [row_end[c - 1], row_end[c]) of the box, counted from its first, are interpolated between cells c and c + 1.
  std::vector<int64_t> row_end(size);
  for (int64_t row = 0, cell = 0; cell < size; ++cell) {
    while (row < rows.last - rows.first && rows.cell[row] <= cell) ++row;
    row_end[cell] = row;
  }
  const int32_t first_cell = rows.cell.front(), end_cell = rows.cell.back() + 1;
  const bool gap = rows.first > 0 || rows.last < height;  // whether background separates the columns of the box
  std::vector<float> column(size + 1);
  std::vector<uint8_t> kinds(size + 1), both(size + 1);  // verdict on each cell, and that on it and the next one
  for (int64_t i = 0; i < columns.last - columns.first; ++i) {
    const int64_t x = columns.first + i;
    const float column_lower = columns.lower[i], column_upper = columns.upper[i];
    const float* here = cells + int64_t{columns.cell[i]} * size;
    const float* next = cells + int64_t{std::min(columns.cell[i] + 1, size - 1)} * size;
    for (int32_t c = 0; c < size; ++c) column[c] = here[c] * column_lower + next[c] * column_upper;
    column[size] = column[size - 1];  // pixels below the center of the last cell have its value
    for (int32_t c = 0; c <= size; ++c) kinds[c] = verdict(column[c]);
    for (int32_t c = 0; c < size; ++c) both[c] = kinds[c] & kinds[c + 1];

    for (int32_t c = first_cell; c < end_cell; ++c) {
      if (both[c] == (mask.open() ? Verdict::kInside : Verdict::kOutside)) continue;
      const int64_t begin = c == 0 ? 0 : row_end[c - 1], end = row_end[c];
      if (begin == end) continue;
      if (both[c] != Verdict::kUnclear) {
        mask.end_run(x, rows.first + begin);
        continue;
      }
      const float above = column[c], below = column[c + 1];
      for (int64_t row = begin; row < end; row += 64) {
        const int64_t count = std::min<int64_t>(end - row, 64);
        const float *lower = &rows.lower[row], *upper = &rows.upper[row];
        uint64_t inside = 0;
        for (int64_t y = 0; y < count; ++y)
          inside |= uint64_t{above * lower[y] + below * upper[y] >= verdict.threshold} << y;
        // bit y: row y differs from the row above it, or the first row from the current run
        uint64_t changes = inside ^ (inside << 1 | uint64_t{mask.open()});
        if (count < 64) changes &= (uint64_t{1} << count) - 1;
        for (; changes != 0; changes &= changes - 1) mask.end_run(x, rows.first + row + __builtin_ctzll(changes));
      }
    }
    if (gap) mask.close_run(x, rows.last);
  }
  mask.close_run(columns.last - 1, rows.last);
}

// The RLE string of one mask, from `values` (m, m), row by row, in `box` (x1, y1, x2, y2); `size` is m.
std::vector<uint8_t> encode(const float* values, const float* box, int32_t size, int64_t height, int64_t width,
                            const Verdict& verdict) {
  Mask mask(height, width);
  if (std::all_of(box, box + 4, [](float edge) { return std::isfinite(edge); })) {
    const Axis columns(box[0], box[2], size, width), rows(box[1], box[3], size, height);
    if (columns.first < columns.last && rows.first < rows.last) {
      std::vector<float> cells(static_cast<size_t>(size) * size);
      for (int32_t x = 0; x < size; ++x)
        for (int32_t y = 0; y < size; ++y) cells[int64_t{x} * size + y] = values[int64_t{y} * size + x];
      draw(cells.data(), size, columns, rows, height, verdict, mask);
    }
  }
  return mask.finish();
}

// The concatenated RLE strings, uint8, and the start of each, (N + 1,) int64: string i is [starts[i], starts[i + 1]).
std::tuple<at::Tensor, at::Tensor> masks_to_rle_cpu(const at::Tensor& probabilities, const at::Tensor& boxes,
                                                    int64_t height, int64_t width, double threshold) {
  check_masks_to_rle(probabilities, boxes, height, width, threshold);
  const int64_t n = probabilities.size(0);
  const auto size = static_cast<int32_t>(probabilities.size(1));
  const at::Tensor values = probabilities.contiguous(), corners = boxes.contiguous();
  const float* value = values.const_data_ptr<float>();
  const float* corner = corners.const_data_ptr<float>();
  const Verdict verdict(static_cast<float>(threshold));
  std::vector<std::vector<uint8_t>> texts(n);
  at::parallel_for(0, n, kMasksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      texts[i] = encode(value + i * size * size, corner + 4 * i, size, height, width, verdict);
  });
  const at::Tensor starts = at::empty({n + 1}, boxes.options().dtype(at::kLong));
  auto* start = starts.mutable_data_ptr<int64_t>();
  start[0] = 0;
  for (int64_t i = 0; i < n; ++i) start[i + 1] = start[i] + static_cast<int64_t>(texts[i].size());
  const at::Tensor counts = at::empty({start[n]}, boxes.options().dtype(at::kByte));
  auto* text = counts.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n; ++i) std::copy(texts[i].begin(), texts[i].end(), text + start[i]);
  return {counts, starts};
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("masks_to_rle", &masks_to_rle_cpu); }

}  // namespace refdet
