// Pastes m x m mask probabilities of boxes into the image and encodes each mask as COCO's compressed RLE, on the CPU.
//
// The probabilities are those at the centers of the m x m cells of the box. A pixel whose center is in the box is
// interpolated bilinearly between the nearest four cell centers, clamped beyond the outer ones, and is in the mask if
// the result is at least the threshold. A box with a NaN or infinite coordinate has an empty mask.
//
// The result is exactly that of masks_to_rle_plain in refdet/ops/masks.py. So the operations and their order matter: in
// float32, first along x and then along y, each time lower * w + upper * (1 - w), with each operation rounded
// separately (-ffp-contract=off in setup.py).
//
// Algorithm: COCO's RLE goes down one column of pixels after the other, and so does `add_box`. No mask is stored, only
// the pixels at which it begins or ends. In each column,
//   1. interpolate along x: this gives m values, at the heights of the cell centers.
//   2. The pixels between two neighboring centers have values between theirs. If both values are clearly above or
//      clearly below the threshold, further than rounding errors reach, these pixels need not be visited.
//   3. Interpolate the pixels between the other centers along y.
// So a box of w x h pixels takes w m interpolations along x, and along y about h / m for each crossing of a column with
// the outline of the mask, instead of w h. Steps 1 and 2 are branchless loops over the m cells, which compilers
// vectorize. Masks are distributed to threads.

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

// COCO's string of run lengths. From the fourth on, a run length is replaced by its difference from the one two before,
// the previous run of the same kind. Numbers are written in groups of five bits, the lowest first, each as a character
// from '0' on; the sixth bit of a group is set if more groups follow.
class RleString {
 public:
  void append(int64_t length) {
    int64_t rest = appended_ > 2 ? length - second_last_ : length;
    ++appended_;
    second_last_ = last_;
    last_ = length;
    bool more = true;
    while (more) {
      int64_t group = rest & 31;
      rest >>= 5;                                  // keeps the sign
      more = group & 16 ? rest != -1 : rest != 0;  // the highest bit of the last group is the sign
      if (more) group |= 32;
      text_.push_back(static_cast<uint8_t>(group + '0'));
    }
  }
  std::vector<uint8_t> take_text() { return std::move(text_); }

 private:
  std::vector<uint8_t> text_;
  int64_t appended_ = 0, last_ = 0, second_last_ = 0;  // the number of run lengths so far, and the last two
};

// Builds the RLE of a mask from the pixels at which runs end, in column order. Runs are alternately background and
// foreground; the first is background, and empty if the mask has the first pixel.
class RunEncoder {
 public:
  RunEncoder(int64_t height, int64_t width) : height_(height), pixels_(height * width) {}

  bool in_foreground() const { return in_foreground_; }  // whether the current run is foreground

  // Ends the current run before pixel (x, y); y may be the height, which is the top of the next column.
  void end_run(int64_t x, int64_t y) {
    const int64_t position = x * height_ + y;
    rle_.append(position - run_start_);
    run_start_ = position;
    in_foreground_ = !in_foreground_;
  }

  // Ends the current run before pixel (x, y) if it is foreground, unless that is the end of the image: finish() ends
  // the last run.
  void end_foreground(int64_t x, int64_t y) {
    if (in_foreground_ && x * height_ + y < pixels_) end_run(x, y);
  }

  std::vector<uint8_t> finish() {
    rle_.append(pixels_ - run_start_);
    return rle_.take_text();
  }

 private:
  RleString rle_;
  int64_t height_, pixels_, run_start_ = 0;  // run_start_: the first pixel of the current run, in column order
  bool in_foreground_ = false;
};

// The pixels along one axis whose centers are in the box, and the two cells between which each is interpolated.
struct Axis {
  int64_t first = 0, last = 0;      // pixels [first, last)
  std::vector<int32_t> cell;        // of each pixel, the first of its two cells; the second is the next, if any
  std::vector<float> lower, upper;  // of each pixel, the weights of the first and of the second cell

  // `low` and `high` are the edges of the box, `size` is m, `limit` is the number of pixels of the image.
  Axis(float low, float high, int64_t size, int64_t limit) {
    // The first pixel whose center is at or after an edge, within the image.
    const auto first_after = [limit](float edge) {
      return static_cast<int64_t>(std::min(std::max(std::ceil(double{edge} - 0.5), 0.0), static_cast<double>(limit)));
    };
    first = first_after(low);
    last = std::max(first, first_after(high));
    const auto count = static_cast<size_t>(last - first);
    cell.resize(count);
    lower.resize(count);
    upper.resize(count);
    const auto scale = static_cast<float>(static_cast<double>(size) / (double{high} - double{low}));
    const auto last_cell = static_cast<float>(size - 1);
    for (size_t i = 0; i < count; ++i) {
      const float center = static_cast<float>(first + static_cast<int64_t>(i)) + 0.5f;
      // in cells, from the center of the first one
      const float position = std::min(std::max((center - low) * scale - 0.5f, 0.0f), last_cell);
      cell[i] = static_cast<int32_t>(position);
      lower[i] = 1.0f - (position - static_cast<float>(cell[i]));
      upper[i] = 1.0f - lower[i];
    }
  }
};

// Decides whether a value is so far from the threshold that a pixel interpolated between two such values on the same
// side is on that side too, whatever its weights. The margins exceed the rounding error of an interpolated value, which
// is less than 2^-21 of it, or 2^-140 if it is denormal.
struct Verdict {
  // single bits: the verdict on two values is the bitwise and of theirs, kUnclear unless they agree
  enum : uint8_t { kUnclear = 0, kInside = 1, kOutside = 2 };
  float threshold, surely_inside, surely_outside;

  explicit Verdict(float t)
      : threshold(t), surely_inside(t * (1 + 0x1p-20f) + 0x1p-100f), surely_outside(t * (1 - 0x1p-20f) - 0x1p-100f) {}

  // NaN, infinite and negative values are unclear.
  uint8_t operator()(float value) const {
    const int inside = (value >= surely_inside) & (value <= std::numeric_limits<float>::max());
    const int outside = (value >= 0.0f) & (value <= surely_outside);
    return static_cast<uint8_t>(inside * kInside | outside * kOutside);
  }
};

// Interpolates rows [begin, end) of the box in column x between the values `above` and `below` of two cell centers, and
// ends a run in `runs` at each change between background and foreground.
inline void add_rows(float above, float below, int64_t begin, int64_t end, int64_t x, const Axis& rows, float threshold,
                     RunEncoder& runs) {
  for (int64_t row = begin; row < end; row += 64) {
    const int64_t count = std::min<int64_t>(end - row, 64);
    const float *lower = &rows.lower[row], *upper = &rows.upper[row];
    uint64_t inside = 0;  // bit i: whether row + i is in the mask
    for (int64_t i = 0; i < count; ++i) inside |= uint64_t{above * lower[i] + below * upper[i] >= threshold} << i;
    const uint64_t before = inside << 1 | uint64_t{runs.in_foreground()};  // bit i: whether row + i - 1 is
    uint64_t changes = inside ^ before;
    if (count < 64) changes &= (uint64_t{1} << count) - 1;
    for (; changes != 0; changes &= changes - 1)  // clears the lowest bit
      runs.end_run(x, rows.first + row + __builtin_ctzll(changes));
  }
}

// Adds the mask of a box to `runs`; `cells` has the probabilities (m, m) of its cells column by column, `size` is m.
void add_box(const float* cells, int32_t size, const Axis& columns, const Axis& rows, int64_t height,
             const Verdict& verdict, RunEncoder& runs) {
  // Rows [row_end[c - 1], row_end[c]) of the box, counted from its first, are interpolated between cells c and c + 1.
  std::vector<int64_t> row_end(size);
  for (int64_t row = 0, cell = 0; cell < size; ++cell) {
    while (row < rows.last - rows.first && rows.cell[row] <= cell) ++row;
    row_end[cell] = row;
  }
  const int32_t first_cell = rows.cell.front(), end_cell = rows.cell.back() + 1;
  // If the box is as high as the image, the foreground at the bottom of a column continues at the top of the next one.
  const bool columns_touch = rows.first == 0 && rows.last == height;
  std::vector<float> column(size + 1);       // values at the cell centers of a column of pixels
  std::vector<uint8_t> verdicts(size + 1);   // on each of these values
  std::vector<uint8_t> pair_verdicts(size);  // on each value together with the next one
  for (int64_t i = 0; i < columns.last - columns.first; ++i) {
    const int64_t x = columns.first + i;
    const float lower = columns.lower[i], upper = columns.upper[i];
    const float* left = cells + int64_t{columns.cell[i]} * size;
    const float* right = cells + int64_t{std::min(columns.cell[i] + 1, size - 1)} * size;
    for (int32_t c = 0; c < size; ++c) column[c] = left[c] * lower + right[c] * upper;
    column[size] = column[size - 1];  // rows below the last cell center have its value
    for (int32_t c = 0; c <= size; ++c) verdicts[c] = verdict(column[c]);
    for (int32_t c = 0; c < size; ++c) pair_verdicts[c] = verdicts[c] & verdicts[c + 1];

    for (int32_t c = first_cell; c < end_cell; ++c) {
      // Rows that surely continue the current run need no work.
      if (pair_verdicts[c] == (runs.in_foreground() ? Verdict::kInside : Verdict::kOutside)) continue;
      const int64_t begin = c == 0 ? 0 : row_end[c - 1], end = row_end[c];
      if (begin == end) continue;
      if (pair_verdicts[c] == Verdict::kUnclear)
        add_rows(column[c], column[c + 1], begin, end, x, rows, verdict.threshold, runs);
      else
        runs.end_run(x, rows.first + begin);  // all of these rows surely differ from the current run
    }
    if (!columns_touch) runs.end_foreground(x, rows.last);
  }
  runs.end_foreground(columns.last - 1, rows.last);
}

// The RLE string of one mask, from `values` (m, m), row by row, in `box` (x1, y1, x2, y2); `size` is m.
std::vector<uint8_t> encode(const float* values, const float* box, int32_t size, int64_t height, int64_t width,
                            const Verdict& verdict) {
  RunEncoder runs(height, width);
  if (std::all_of(box, box + 4, [](float edge) { return std::isfinite(edge); })) {
    const Axis columns(box[0], box[2], size, width), rows(box[1], box[3], size, height);
    if (columns.first < columns.last && rows.first < rows.last) {
      std::vector<float> cells(static_cast<size_t>(size) * size);
      for (int32_t x = 0; x < size; ++x)
        for (int32_t y = 0; y < size; ++y) cells[int64_t{x} * size + y] = values[int64_t{y} * size + x];
      add_box(cells.data(), size, columns, rows, height, verdict, runs);
    }
  }
  return runs.finish();
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
