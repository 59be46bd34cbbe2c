// Feature maps with contiguous channels (channels_last), the input of the convolutions.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>

namespace refdet {

// Stride between positions of a map with contiguous channels and evenly spaced positions, otherwise 0. The stride of a
// dimension of size 1 is ignored.
inline int64_t distance_of_positions(const at::Tensor& x) {
  int64_t pixel = x.size(1), positions = 1;
  for (const int64_t dimension : {3, 2, 0}) {
    if (x.size(dimension) == 1) continue;
    if (positions == 1) pixel = x.stride(dimension);
    if (x.stride(dimension) != pixel * positions) return 0;
    positions *= x.size(dimension);
  }
  return (x.stride(1) == 1 || x.size(1) == 1) && pixel >= x.size(1) ? pixel : 0;
}

// The map, or a copy of it with evenly spaced positions.
inline at::Tensor with_positions(const at::Tensor& x) {
  return distance_of_positions(x) != 0 ? x : at::empty_like(x, at::MemoryFormat::ChannelsLast).copy_(x);
}

// A map (N, C, H, W) with stride `pixel` between positions.
template <typename Map>
struct Positions {
  const Map* data;
  int64_t images, channels, height, width, pixel;

  explicit Positions(const at::Tensor& x)
      : data(x.const_data_ptr<Map>()),
        images(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        pixel(distance_of_positions(x)) {}

  int64_t count() const { return images * height * width; }
};

}  // namespace refdet
