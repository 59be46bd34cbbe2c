// 3x3 convolutions for inference on the CPU: stride 1, padding 1, channels in multiples of 16. In float32, or with maps
// in bfloat16 and products in float16 (gemm.h).
//
// Winograd's minimal filtering (winograd.h): input transform; at each of 36 points a matrix product of tiles and
// weights over the input channels (gemm.h); output transform. winograd_weights_cpu.cpp transforms the weights.
//
// Cost: 121 products for the 49 results of a 7x7 RoI instead of 441, and memory traffic of 2.5 maps in and 2.5 out.
//
// Speed: a third or a quarter of the multiply-adds of a direct convolution, in a loop that does nothing else. Weights
// are packed once. Tiles go through the three steps in blocks that stay in the last-level cache. Results do not depend
// on the batch, the other RoIs of a call or the number of threads (`Single`).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "conv/gemm.h"
#include "conv/positions.h"
#include "conv/scales.h"
#include "conv/weights.h"
#include "conv/winograd.h"
#include "conv/winograd_transforms.h"

namespace refdet {
namespace {

constexpr int64_t kAllPoints = kPoints * kPoints;  // of a tile
constexpr int64_t kTilesAtOnce = 144;              // in a block, or one row of tiles if that is more
constexpr int64_t kWidthAtOnce = 128;              // output channels of a work item

template <typename Product>
struct Result {
  typename Product::Map* data;
  int64_t channels;
  const float *scale, *bias;  // of each channel
  bool relu;
};

// A range of rows of tiles, of one or more images, and the layout of their values at each point.
struct Block {
  struct Row {
    int64_t image;
    int64_t tile;         // index of the row among those of its image
    int64_t among_fours;  // number of earlier rows of this block whose tiles are 4 high
  };
  Tiles down, across;
  std::vector<Row> rows;
  int64_t fours = 0;                        // rows whose tiles are 4 high
  std::array<int64_t, kAllPoints> slots{};  // of each point, how many tiles use it: each has a slot
  std::array<int64_t, kAllPoints> first{};  // of each point, the number of slots of all points before it

  // Rows of tiles [begin, end), counted over all images.
  Block(const Tiles& down, const Tiles& across, int64_t begin, int64_t end) : down(down), across(across) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t tile = row % down.count();
      rows.push_back({row / down.count(), tile, fours});
      fours += down.is_four(tile);
    }
    int64_t sum = 0;
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        const int64_t point = i * kPoints + j;
        slots[point] = (i < kPoints - 1 ? static_cast<int64_t>(rows.size()) : fours) * across.count_using(j);
        first[point] = sum, sum += slots[point];
      }
    }
  }

  // Offset of the values of a point, `channels` for each slot. Points are padded by a vector: otherwise the values of a
  // tile at its points would all map to the same cache set.
  int64_t offset(int64_t point, int64_t channels) const { return first[point] * channels + point * kLanes; }
  // The slot of a tile at point (i, j).
  int64_t slot(int64_t row, int64_t column, int i, int j) const {
    return (i < kPoints - 1 ? row : rows[row].among_fours) * across.count_using(j) + column;
  }
};

// Transforms a tile and stores its values by point; within a point in slices of kDepth channels, each slice by slot.
//
// Returns the scale factor of the tile, a power of two; 1 if the product needs none.
template <typename Product, int down, int across>
REFDET_INLINE float to_points(const Positions<typename Product::Map>& x, const Block& block, int64_t row,
                              int64_t column, typename Product::A* points) {
  constexpr int kHigh = down + kTaps - 1, kWide = across + kTaps - 1;
  const auto* image = x.data + block.rows[row].image * x.height * x.width * x.stride;
  const int64_t top = block.down.start(block.rows[row].tile) - 1, left = block.across.start(column) - 1;
  float scale = 1;
  if constexpr (Product::kScaled) {
    const int64_t first_x = std::max(left, int64_t{0}), last_x = std::min(left + kWide, x.width);
    MaxMagnitude magnitude;
    for (int64_t at_y = std::max(top, int64_t{0}); at_y < std::min(top + kHigh, x.height); ++at_y) {
      for (int64_t at_x = first_x; at_x < last_x; ++at_x) {
        magnitude.update(image + (at_y * x.width + at_x) * x.stride, x.channels);
      }
    }
    scale = scale_to(Product::kMaxValue / kGrowth, magnitude);
  }
  for (int64_t c = 0; c < x.channels; c += kLanes) {
    const int64_t slice = c / Product::kDepth * Product::kDepth, depth = std::min(Product::kDepth, x.channels - slice);
    transform_tile<kInput<down>, kInput<across>>(
        x, image, top, left, c, [&](int i, int j, const Floats& value) __attribute__((always_inline)) {
          const int64_t point = i * kPoints + j;
          const int64_t offset = block.offset(point, x.channels) + slice * block.slots[point];
          store(Product::kScaled ? value * scale : value,
                points + offset + block.slot(row, column, i, j) * depth + (c - slice));
        });
  }
  return scale;
}

// Computes the results of a tile from the products at its points, stored by point and slot; `scale` is the factor that
// `to_points` returned.
template <typename Product, int down, int across>
REFDET_INLINE void from_points(const Positions<typename Product::Map>& x, const Block& block, int64_t row,
                               int64_t column, const float* products, float scale, const Result<Product>& y) {
  constexpr int kHigh = down + kTaps - 1, kWide = across + kTaps - 1;
  auto* image = y.data + block.rows[row].image * x.height * x.width * y.channels;
  const int64_t top = block.down.start(block.rows[row].tile), left = block.across.start(column);
  const float tile_scale = 1 / scale;
  for (int64_t c = 0; c < y.channels; c += kLanes) {
    Floats values[kHigh][kWide], half[down][kWide], results[across], bias, scales;
    load(y.bias + c, bias);
    if constexpr (Product::kScaled) load(y.scale + c, scales);
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < kWide; ++j) {
        const int64_t offset = block.offset(i * kPoints + j, y.channels) + block.slot(row, column, i, j) * y.channels;
        load(products + offset + c, values[i][j]);
      }
    }
    for (int j = 0; j < kWide; ++j) apply<kOutput<down>>(&values[0][j], kWide, &half[0][j], kWide);
    for (int i = 0; i < down; ++i) {
      apply<kOutput<across>>(half[i], 1, results, 1);
      for (int j = 0; j < across; ++j) {
        const int64_t at_y = top + i, at_x = left + j;
        if (at_y >= x.height || at_x >= x.width) continue;
        Floats result = results[j];
        if constexpr (Product::kScaled) result = result * tile_scale * scales;
        result += bias;
        if (y.relu) relu(result);
        store(result, image + (at_y * x.width + at_x) * y.channels + c);
      }
    }
  }
}

// Calls `function` with the height and width of a tile as compile-time constants.
template <typename Function>
REFDET_INLINE auto with_tile_size(const Block& block, int64_t row, int64_t column, const Function& function) {
  using Four = std::integral_constant<int, 4>;
  using Three = std::integral_constant<int, 3>;
  const bool four_across = block.across.is_four(column);
  if (block.down.is_four(block.rows[row].tile)) {
    return four_across ? function(Four{}, Four{}) : function(Four{}, Three{});
  }
  return four_across ? function(Three{}, Four{}) : function(Three{}, Three{});
}

REFDET_AVX2 float tile_to_points_avx2(const Positions<float>& x, const Block& block, int64_t row, int64_t column,
                                      float* points) {
  return with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    return to_points<Single, down.value, across.value>(x, block, row, column, points);
  });
}

REFDET_AVX512 float tile_to_points_avx512(const Positions<float>& x, const Block& block, int64_t row, int64_t column,
                                          float* points) {
  return with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    return to_points<Single, down.value, across.value>(x, block, row, column, points);
  });
}

float tile_to_points(const Positions<float>& x, const Block& block, int64_t row, int64_t column, float* points) {
  return (has_avx512() ? tile_to_points_avx512 : tile_to_points_avx2)(x, block, row, column, points);
}

REFDET_AVX2 void tile_from_points_avx2(const Positions<float>& x, const Block& block, int64_t row, int64_t column,
                                       const float* products, float scale, const Result<Single>& y) {
  with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    from_points<Single, down.value, across.value>(x, block, row, column, products, scale, y);
  });
}

REFDET_AVX512 void tile_from_points_avx512(const Positions<float>& x, const Block& block, int64_t row, int64_t column,
                                           const float* products, float scale, const Result<Single>& y) {
  with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    from_points<Single, down.value, across.value>(x, block, row, column, products, scale, y);
  });
}

void tile_from_points(const Positions<float>& x, const Block& block, int64_t row, int64_t column, const float* products,
                      float scale, const Result<Single>& y) {
  (has_avx512() ? tile_from_points_avx512 : tile_from_points_avx2)(x, block, row, column, products, scale, y);
}

#ifdef REFDET_FLOAT16
REFDET_FLOAT16 float tile_to_points(const Positions<c10::BFloat16>& x, const Block& block, int64_t row, int64_t column,
                                    uint32_t* points) {
  return with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    return to_points<Half, down.value, across.value>(x, block, row, column, points);
  });
}

REFDET_FLOAT16 void tile_from_points(const Positions<c10::BFloat16>& x, const Block& block, int64_t row, int64_t column,
                                     const float* products, float scale, const Result<Half>& y) {
  with_tile_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    from_points<Half, down.value, across.value>(x, block, row, column, products, scale, y);
  });
}
#endif

// At each point, multiplies the values of tiles by weights. A work item is a point, or with many threads a range of its
// output channels, so that the tiles' values stay in the L2 cache of a thread.
template <typename Product>
void multiply_points(const Block& block, const typename Product::A* points, int64_t in_channels,
                     const typename Product::B* weights, int64_t channels, float* products) {
  const int64_t groups = (channels + kWidthAtOnce - 1) / kWidthAtOnce;
  const int64_t pieces =
      std::min<int64_t>((at::get_num_threads() + 8) / 9, groups);  // 4 work items per thread over all points
  parallel_tasks(
      pieces * kAllPoints, [] { return nullptr; },
      [&](std::nullptr_t, int64_t piece) {
        const int64_t point = piece / pieces, slots = block.slots[point];
        for (int64_t group = piece % pieces; group < groups; group += pieces) {
          const int64_t first = group * kWidthAtOnce, width = std::min(kWidthAtOnce, channels - first);
          float* to = products + block.offset(point, channels) + first;
          for (int64_t k = 0; k < in_channels; k += Product::kDepth) {
            const int64_t depth = std::min(Product::kDepth, in_channels - k);
            const auto* left = points + block.offset(point, in_channels) + k * slots;
            const auto* panel = weights + (point * channels + first) * in_channels + k * Product::kPanel;
            Product::multiply(left, depth, panel, in_channels * Product::kPanel, width / Product::kPanel, depth, slots,
                              to, channels, k > 0);
          }
        }
      });
}

template <typename Product>
void convolve(const Positions<typename Product::Map>& x, const typename Product::B* weights, const Result<Product>& y) {
  const Tiles down(x.height), across(x.width);
  const int64_t rows = x.images * down.count(), columns = across.count();
  const int64_t blocks = std::max((rows * columns + kTilesAtOnce / 2) / kTilesAtOnce, int64_t{1});
  const int64_t rows_per_block = (rows + blocks - 1) / blocks, max_tiles = rows_per_block * columns;
  const Scratch<typename Product::A> point_memory(max_tiles * kAllPoints * x.channels + kAllPoints * kLanes);
  const Scratch<float> product_memory(max_tiles * kAllPoints * y.channels + kAllPoints * kLanes);
  auto* points = point_memory.data();
  float* products = product_memory.data();
  std::vector<float> scales(max_tiles);
  for (int64_t begin = 0; begin < rows; begin += rows_per_block) {
    const Block block(down, across, begin, std::min(begin + rows_per_block, rows));
    const int64_t tiles = static_cast<int64_t>(block.rows.size()) * columns;
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) scales[i] = tile_to_points(x, block, i / columns, i % columns, points);
    });
    multiply_points<Product>(block, points, x.channels, weights, y.channels, products);
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        tile_from_points(x, block, i / columns, i % columns, products, scales[i], y);
      }
    });
  }
}

template <typename Product>
at::Tensor run_conv3x3(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bias,
                       bool relu) {
  const int64_t channels = check_packed<Product>("conv3x3", x, weight, scale, bias, kPoints * kPoints);
  const at::Tensor map = with_even_positions(x), scales = scale.contiguous(), shift = bias.contiguous();
  at::Tensor out = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  if (out.numel() > 0) {
    convolve<Product>(Positions<typename Product::Map>(map), weight.const_data_ptr<typename Product::B>(),
                      {out.mutable_data_ptr<typename Product::Map>(), channels, scales.const_data_ptr<float>(),
                       shift.const_data_ptr<float>(), relu});
  }
  return out;
}

at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bias,
                       bool relu) {
#ifdef REFDET_FLOAT16
  if (weight.scalar_type() == at::kHalf) return run_conv3x3<Half>(x, weight, scale, bias, relu);
#endif
  return run_conv3x3<Single>(x, weight, scale, bias, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("conv3x3", &conv3x3_cpu); }

}  // namespace refdet
