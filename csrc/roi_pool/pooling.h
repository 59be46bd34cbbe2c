// Shared by the CPU and CUDA kernels of RoI pooling: the positions of the map that a cell reads, and their weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define REFDET_HOST_DEVICE __host__ __device__
#else
#define REFDET_HOST_DEVICE
#endif

namespace refdet {

constexpr int64_t kMaxSide = 1024;  // limit of the cells on a side of a RoI, and of the samples on a side of a cell

// Every operation is rounded separately, on the GPU too, so that both agree whether a sample at the edge of the map is
// inside or outside.
REFDET_HOST_DEVICE inline float times(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Pooling options.
struct Sampling {
  int64_t size;     // cells on a side of a RoI
  int64_t samples;  // RoIAlign: samples on a side of a cell; 0 for adaptive sampling, up to kMaxSide
  float stride;     // pixels of the network's input from one position of the map to the next
  bool crop;        // not RoIAlign, but one sample per cell, the first and last at the edges of the RoI
  bool mean;        // only the mean over the cells

  // Cells on a side of the result.
  REFDET_HOST_DEVICE int64_t cells() const { return mean ? 1 : size; }

  // Largest number of positions that a cell can read along an axis of `limit` positions.
  int64_t capacity(int64_t limit) const {
    const int64_t per_cell = crop ? 1 : samples > 0 ? samples : kMaxSide;
    return std::min(2 * per_cell * (mean ? size : 1), limit);
  }

  // Samples of a cell along an axis on which the RoI is `side` positions long.
  REFDET_HOST_DEVICE int64_t samples_of(float side) const {
    if (crop) return 1;
    if (samples > 0) return samples;
    const float count = std::ceil(side / static_cast<float>(size));
    if (!(count > 0)) return 0;
    return count > static_cast<float>(kMaxSide) ? kMaxSide : static_cast<int64_t>(count);
  }
};

// The positions that a cell reads along one axis, ascending and unique, and their weights.
struct Taps {
  int32_t* position;
  float* weight;
  int32_t count = 0;

  REFDET_HOST_DEVICE void add(int32_t new_position, float new_weight) {
    if (count > 0 && position[count - 1] == new_position) {
      weight[count - 1] += new_weight;
    } else if (count > 1 && position[count - 2] == new_position) {
      weight[count - 2] += new_weight;
    } else {
      position[count] = new_position, weight[count++] = new_weight;
    }
  }
};

// Fills `taps`, which has room for capacity(limit), for one cell along one axis, on which the RoI reaches from `low` to
// `high`, in pixels of the network's input, and the map has `limit` positions. Samples that are outside the map, NaN or
// infinite read nothing.
REFDET_HOST_DEVICE inline void find_taps(const Sampling& sampling, float low, float high, int64_t cell, int64_t limit,
                                         Taps& taps) {
  low /= sampling.stride, high /= sampling.stride;
  const float side = high - low;
  const int64_t samples = sampling.samples_of(side), total = sampling.size * samples,
                count = sampling.mean ? total : samples;
  const int64_t first = sampling.mean ? 0 : cell * samples;
  if (limit == 0) return;
  const auto last = static_cast<float>(limit - 1);
  for (int64_t i = 0; i < count; ++i) {
    const auto k = static_cast<float>(first + (side < 0 ? count - 1 - i : i));  // positions ascend
    float coordinate;
    if (sampling.crop) {
      coordinate = low + times(side, k / static_cast<float>(sampling.size - 1));
      if (!(coordinate > -1 && coordinate < last + 1)) continue;
    } else {
      coordinate = low - 0.5f + times(side, (k + 0.5f) / static_cast<float>(total));
      if (!(coordinate >= -1 && coordinate <= last + 1)) continue;
      coordinate = coordinate < 0      ? 0
                   : coordinate > last ? last
                                       : coordinate;  // up to 1 outside counts as the border, as in detectron2
    }
    const float floor = std::floor(coordinate), fraction = coordinate - floor;
    const auto position = static_cast<int32_t>(floor);
    if (position >= 0) taps.add(position, 1 - fraction);
    if (fraction > 0 && position + 1 < limit) taps.add(position + 1, fraction);
  }
  for (int32_t i = 0; i < taps.count; ++i) taps.weight[i] /= static_cast<float>(count);
}

inline Sampling check_pooling(at::IntArrayRef map, const at::Tensor& values, const at::Tensor& rois, int64_t size,
                              double stride, int64_t samples, bool crop, bool mean) {
  TORCH_CHECK(map.size() == 4, "RoI pooling: the map must be (B, C, H, W), got ", map);
  TORCH_CHECK(map[2] < std::numeric_limits<int32_t>::max() && map[3] < std::numeric_limits<int32_t>::max(),
              "RoI pooling: the map is too large: ", map);
  TORCH_CHECK(values.scalar_type() == at::kFloat || values.scalar_type() == at::kBFloat16,
              "RoI pooling: the map must be float32 or bfloat16, got ", values.scalar_type());
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "RoI pooling: RoIs must be (K, 5), got ", rois.sizes());
  TORCH_CHECK(rois.scalar_type() == at::kFloat, "RoI pooling: RoIs must be float32, got ", rois.scalar_type());
  TORCH_CHECK(rois.device() == values.device(), "RoI pooling: the map is on ", values.device(), ", the RoIs on ",
              rois.device());
  TORCH_CHECK(size >= (crop ? 2 : 1) && size <= kMaxSide, "RoI pooling: size must be in ", crop ? 2 : 1, "..", kMaxSide,
              ", got ", size);
  TORCH_CHECK(samples >= 0 && samples <= kMaxSide, "RoI pooling: samples must be in 0..", kMaxSide, ", got ", samples);
  TORCH_CHECK(stride > 0 && std::isfinite(stride), "RoI pooling: the stride must be above 0, got ", stride);
  return {size, samples, static_cast<float>(stride), crop, mean};
}

inline void check_pooled(const at::Tensor& pooled, const at::Tensor& rois, at::IntArrayRef map,
                         const Sampling& sampling) {
  TORCH_CHECK(pooled.sizes() == at::IntArrayRef({rois.size(0), map[1], sampling.cells(), sampling.cells()}),
              "RoI pooling: the gradient has the wrong shape, got ", pooled.sizes());
}

// The map in channels_last; copied only if necessary.
inline at::Tensor with_channels_last(const at::Tensor& map) {
  return map.size(1) <= 1 || map.stride(1) == 1 ? map : map.contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace refdet
