// COCO's compressed RLE of masks as they come into being, run by run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace refdet {

// counts (M,), starts (N + 1,), areas (N,), tight boxes (N, 4), all on the CPU.
using EncodedMasks = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// COCO's string: each count in groups of five bits, lowest first, in characters from '0' on, the sixth bit telling
// that more follow; from the fourth count on it is the difference to the count two before.
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
  int64_t added_ = 0, older_ = 0, newer_ = 0;
};

// A mask as it comes into being: runs are opened and closed in the order of the columns.
class Mask {
 public:
  Mask(int64_t height, int64_t width) : height_(height), width_(width), top_(height) {}

  bool open() const { return open_; }

  // The first pixel of the other kind is (x, y); y may be the height, which is the top of the next column.
  void turn(int64_t x, int64_t y) {
    const int64_t position = x * height_ + y;
    counts_.add(position - position_);
    if (open_) {
      close(x, y);
      area_ += position - position_;
    } else {
      if (area_ == 0) left_ = x;
      run_x_ = x, run_y_ = y;
    }
    position_ = position;
    open_ = !open_;
  }

  // From (x, y) on comes background, or the end of the image.
  void leave(int64_t x, int64_t y) {
    if (open_ && x * height_ + y < height_ * width_) turn(x, y);
  }

  void finish() {
    const int64_t rest = height_ * width_ - position_;
    if (open_) {
      close(width_, 0);
      area_ += rest;
    }
    counts_.add(rest);
  }

  std::vector<uint8_t> take_text() { return counts_.take_text(); }
  int64_t area() const { return area_; }

  void tight_box(float* box) const {
    const bool empty = area_ == 0;
    const int64_t sides[] = {left_, empty ? 0 : top_, right_, bottom_};
    for (int i = 0; i < 4; ++i) box[i] = static_cast<float>(sides[i]);
  }

 private:
  // (x, y) is one past the run.
  void close(int64_t x, int64_t y) {
    if (y == 0) --x, y = height_;
    const bool one_column = x == run_x_;
    top_ = std::min(top_, one_column ? run_y_ : 0);
    bottom_ = std::max(bottom_, one_column ? y : height_);
    right_ = x + 1;
  }

  Counts counts_;
  int64_t height_, width_, position_ = 0, area_ = 0, run_x_ = 0, run_y_ = 0;
  int64_t left_ = 0, top_, right_ = 0, bottom_ = 0;
  bool open_ = false;
};

// N masks, each made by `mask_of(i)` and finished; they are dealt out to the threads, and each writes its own string.
template <typename MaskOf>
EncodedMasks encode(int64_t n, const MaskOf& mask_of) {
  constexpr int64_t kMasksPerTask = 4;
  const auto integers = at::TensorOptions().dtype(at::kLong);
  const at::Tensor starts = at::empty({n + 1}, integers), areas = at::empty({n}, integers);
  const at::Tensor tight = at::empty({n, 4}, integers.dtype(at::kFloat));
  auto* start = starts.mutable_data_ptr<int64_t>();
  auto* area = areas.mutable_data_ptr<int64_t>();
  auto* tight_box = tight.mutable_data_ptr<float>();
  std::vector<std::vector<uint8_t>> texts(n);
  at::parallel_for(0, n, kMasksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Mask mask = mask_of(i);
      area[i] = mask.area();
      mask.tight_box(tight_box + 4 * i);
      texts[i] = mask.take_text();
    }
  });
  start[0] = 0;
  for (int64_t i = 0; i < n; ++i) start[i + 1] = start[i] + static_cast<int64_t>(texts[i].size());
  const at::Tensor counts = at::empty({start[n]}, integers.dtype(at::kByte));
  auto* text = counts.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n; ++i) std::copy(texts[i].begin(), texts[i].end(), text + start[i]);
  return {counts, starts, areas, tight};
}

}  // namespace refdet
