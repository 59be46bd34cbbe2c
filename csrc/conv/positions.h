// Feature maps with contiguous channels (channels_last), the input of the convolutions.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>

namespace refdet {

// Elements from one position (n, h, w) of a map to the next, or 0 if channels are not contiguous or positions not
// evenly spaced. The stride of a dimension of size 1 is ignored.
inline int64_t position_stride(const at::Tensor& x) {
  int64_t stride = x.size(1), positions = 1;
  for (const int64_t dimension : {3, 2, 0}) {
    if (x.size(dimension) == 1) continue;
    if (positions == 1) stride = x.stride(dimension);
    if (x.stride(dimension) != stride * positions) return 0;
    positions *= x.size(dimension);
  }
  return (x.stride(1) == 1 || x.size(1) == 1) && stride >= x.size(1) ? stride : 0;
}

// The map, or a copy of it with evenly spaced positions.
inline at::Tensor with_even_positions(const at::Tensor& x) {
  return position_stride(x) != 0 ? x : at::empty_like(x, at::MemoryFormat::ChannelsLast).copy_(x);
}

// A map (N, C, H, W) with a constant `stride` between positions, in elements.
template <typename Map>
struct Positions {
  const Map* data;
  int64_t images, channels, height, width, stride;

  explicit Positions(const at::Tensor& x)
      : data(x.const_data_ptr<Map>()),
        images(x.size(0)),
        channels(x.size(1)),
        height(x.size(2)),
        width(x.size(3)),
        stride(position_stride(x)) {}

  int64_t count() const { return images * height * width; }
};

}  // namespace refdet
