// 3x3 convolutions of a detector in use, on the CPU: stride 1, one row of zeros around the map, float32, channels in
// multiples of 16.
//
// What: Winograd's minimal filtering (winograd.h). Inputs go to points; at each of 36 points there is a matrix product
// of tiles and weights, summed over the input channels (gemm.h); the products go to results.
//
// Cost: 121 products for the 49 results of a 7x7 RoI instead of 441, and the bytes of 2.5 maps in and 2.5 out.
//
// Why fast: a third or a fourth of the multiply-adds of the plain sum, in a loop that does nothing else. Weights are
// packed once. Tiles go through the three steps in blocks that stay in the last cache. Each number comes out the same
// whatever the batch, the other RoIs of a call and the number of threads, see `multiply`.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "simd.h"
#include "winograd.h"

// Memory sets the pace between the products: wider vectors would gain nothing.
#if defined(__x86_64__) && defined(__GNUC__)
#define REFDET_AVX2 __attribute__((target("avx2")))
#else
#define REFDET_AVX2
#endif

namespace refdet {
namespace {

constexpr int64_t kTilesAtOnce = 128;  // or one row of them, where that is more
constexpr int64_t kPanelsAtOnce = 4;

// A map with channels side by side: `pixel` numbers from one position to the next.
struct Positions {
  const float* data;
  int64_t images, channels, height, width, pixel;
};

struct Result {
  float* data;
  int64_t channels;
  const float* bias;
};

// Some rows of tiles, of one or more images, and where their numbers lie at each point.
struct Block {
  struct Row {
    int64_t image, tile, among_fours;
  };
  Tiles down, across;
  std::vector<Row> rows;
  int64_t fours = 0;
  std::array<int64_t, kPoints * kPoints> slots{}, first{};  // of a point: how many tiles use it, and the sum of all before

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
        slots[point] = (i < kPoints - 1 ? static_cast<int64_t>(rows.size()) : fours) * across.with(j);
        first[point] = sum, sum += slots[point];
      }
    }
  }

  // Where the numbers of a point begin, of `channels` for each tile. Points lie a vector further apart than they must:
  // else the numbers of a tile at its points would all want the same place in a cache.
  int64_t at(int64_t point, int64_t channels) const { return first[point] * channels + point * kLanes; }
  int64_t slot(int64_t row, int64_t column, int i, int j) const {
    return (i < kPoints - 1 ? row : rows[row].among_fours) * across.with(j) + column;
  }
};

// to[i * to_step] = sum over j of matrix[i][j] from[j * from_step], where the matrix is known to the compiler.
template <const auto& matrix>
REFDET_INLINE void apply(const Floats* from, int64_t from_step, Floats* to, int64_t to_step) {
  constexpr size_t kTo = matrix.size(), kFrom = matrix[0].size();
  Floats values[kFrom];
#pragma GCC unroll 6
  for (size_t j = 0; j < kFrom; ++j) values[j] = from[j * from_step];
#pragma GCC unroll 6
  for (size_t i = 0; i < kTo; ++i) {
    Floats sum{};
#pragma GCC unroll 6
    for (size_t j = 0; j < kFrom; ++j) {
      if (matrix[i][j] != 0) sum += matrix[i][j] * values[j];
    }
    to[i * to_step] = sum;
  }
}

template <int results>
constexpr auto kInput = input_matrix<results>();
template <int results>
constexpr auto kOutput = output_matrix<results>();

// The numbers of a tile at its points. They lie by points; those of a point in parts of kDepth channels; those of a
// part by slots.
template <int down, int across>
REFDET_INLINE void to_points(const Positions& x, const Block& block, int64_t row, int64_t column, float* points) {
  constexpr int kHigh = down + kTaps - 1, kWide = across + kTaps - 1;
  const float* image = x.data + block.rows[row].image * x.height * x.width * x.pixel;
  const int64_t top = block.down.start(block.rows[row].tile) - 1, left = block.across.start(column) - 1;
  for (int64_t c = 0; c < x.channels; c += kLanes) {
    Floats inputs[kHigh][kWide], half[kHigh][kWide], values[kWide];
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < kWide; ++j) {
        const int64_t at_y = top + i, at_x = left + j;
        inputs[i][j] = Floats{};
        if (at_y >= 0 && at_y < x.height && at_x >= 0 && at_x < x.width) {
          load(image + (at_y * x.width + at_x) * x.pixel + c, inputs[i][j]);
        }
      }
    }
    for (int j = 0; j < kWide; ++j) apply<kInput<down>>(&inputs[0][j], kWide, &half[0][j], kWide);
    const int64_t part = c / kDepth * kDepth, depth = std::min(kDepth, x.channels - part);
    for (int i = 0; i < kHigh; ++i) {
      apply<kInput<across>>(half[i], 1, values, 1);
      for (int j = 0; j < kWide; ++j) {
        const int64_t point = i * kPoints + j;
        const int64_t at = block.at(point, x.channels) + part * block.slots[point];
        store(values[j], points + at + block.slot(row, column, i, j) * depth + (c - part));
      }
    }
  }
}

// The results of a tile, of the products at its points, which lie by points and slots.
template <int down, int across>
REFDET_INLINE void from_points(const Positions& x, const Block& block, int64_t row, int64_t column,
                               const float* products, const Result& y) {
  constexpr int kHigh = down + kTaps - 1, kWide = across + kTaps - 1;
  float* image = y.data + block.rows[row].image * x.height * x.width * y.channels;
  const int64_t top = block.down.start(block.rows[row].tile), left = block.across.start(column);
  for (int64_t c = 0; c < y.channels; c += kLanes) {
    Floats values[kHigh][kWide], half[down][kWide], results[across], bias;
    load(y.bias + c, bias);
    for (int i = 0; i < kHigh; ++i) {
      for (int j = 0; j < kWide; ++j) {
        const int64_t at = block.at(i * kPoints + j, y.channels) + block.slot(row, column, i, j) * y.channels;
        load(products + at + c, values[i][j]);
      }
    }
    for (int j = 0; j < kWide; ++j) apply<kOutput<down>>(&values[0][j], kWide, &half[0][j], kWide);
    for (int i = 0; i < down; ++i) {
      apply<kOutput<across>>(half[i], 1, results, 1);
      for (int j = 0; j < across; ++j) {
        const int64_t at_y = top + i, at_x = left + j;
        if (at_y >= x.height || at_x >= x.width) continue;
        store(results[j] + bias, image + (at_y * x.width + at_x) * y.channels + c);
      }
    }
  }
}

// Calls `each` with the size of a tile, as constants.
template <typename Each>
REFDET_INLINE void by_size(const Block& block, int64_t row, int64_t column, const Each& each) {
  using Four = std::integral_constant<int, 4>;
  using Three = std::integral_constant<int, 3>;
  const bool four_across = block.across.is_four(column);
  if (block.down.is_four(block.rows[row].tile)) {
    four_across ? each(Four{}, Four{}) : each(Four{}, Three{});
  } else {
    four_across ? each(Three{}, Four{}) : each(Three{}, Three{});
  }
}

REFDET_AVX2 void tile_to_points(const Positions& x, const Block& block, int64_t row, int64_t column, float* points) {
  by_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    to_points<down.value, across.value>(x, block, row, column, points);
  });
}

REFDET_AVX2 void tile_from_points(const Positions& x, const Block& block, int64_t row, int64_t column,
                                  const float* products, const Result& y) {
  by_size(block, row, column, [&](auto down, auto across) __attribute__((always_inline)) {
    from_points<down.value, across.value>(x, block, row, column, products, y);
  });
}

// At each point, numbers of tiles times weights. One piece of work is some output channels of a point.
void multiply_points(const Block& block, const float* points, int64_t depth_in_all, const float* weights,
                     int64_t channels, float* products) {
  constexpr int64_t kWidth = kPanelsAtOnce * kPanel, kAll = kPoints * kPoints;
  const int64_t groups = (channels + kWidth - 1) / kWidth;
  at::parallel_for(0, groups * kAll, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t point = i % kAll, first = i / kAll * kWidth, last = std::min(first + kWidth, channels);
      const int64_t slots = block.slots[point];
      for (int64_t k = 0; k < depth_in_all; k += kDepth) {
        const int64_t depth = std::min(kDepth, depth_in_all - k);
        const float* left = points + block.at(point, depth_in_all) + k * slots;
        for (int64_t c = first; c < last; c += kPanel) {
          const float* panel = weights + (point * channels + c) * depth_in_all + k * kPanel;
          multiply(left, depth, panel, depth, slots, products + block.at(point, channels) + c, channels, k > 0);
        }
      }
    }
  });
}

void convolve(const Positions& x, const float* weights, const Result& y) {
  const Tiles down(x.height), across(x.width);
  const int64_t total = x.images * down.count();
  const int64_t blocks = std::max((total * across.count() + kTilesAtOnce / 2) / kTilesAtOnce, int64_t{1});
  const int64_t each = (total + blocks - 1) / blocks;
  const int64_t most = std::min(each, total) * across.count() * kPoints * kPoints;
  const at::Tensor in = at::empty({most * x.channels + kPoints * kPoints * kLanes}, at::kFloat);
  const at::Tensor made = at::empty({most * y.channels + kPoints * kPoints * kLanes}, at::kFloat);
  float *points = in.mutable_data_ptr<float>(), *products = made.mutable_data_ptr<float>();
  for (int64_t begin = 0; begin < total; begin += each) {
    const Block block(down, across, begin, std::min(begin + each, total));
    const int64_t wide = across.count(), tiles = static_cast<int64_t>(block.rows.size()) * wide;
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) tile_to_points(x, block, i / wide, i % wide, points);
    });
    multiply_points(block, points, x.channels, weights, y.channels, products);
    at::parallel_for(0, tiles, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) tile_from_points(x, block, i / wide, i % wide, products, y);
    });
  }
}

void check_processor() {
  TORCH_CHECK(can_multiply(), "conv3x3: this processor has no AVX2 or no fused multiply-adds");
}

// (K, C, 3, 3) -> (36, K / 16, C, 16): at each point, panels of 16 output channels.
at::Tensor pack_conv3x3_cpu(const at::Tensor& weight) {
  check_processor();
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == kTaps && weight.size(3) == kTaps,
              "conv3x3: the weight must be (K, C, 3, 3), got ", weight.sizes());
  TORCH_CHECK(weight.size(0) % kPanel == 0 && weight.size(1) % kLanes == 0 && weight.size(0) > 0 && weight.size(1) > 0,
              "conv3x3: channels must be multiples of 16, got ", weight.sizes());
  TORCH_CHECK(weight.scalar_type() == at::kFloat, "conv3x3: the weight must be float32, got ", weight.scalar_type());
  const at::Tensor given = weight.contiguous();
  const int64_t out = given.size(0), in = given.size(1);
  at::Tensor packed = at::empty({kPoints * kPoints, out / kPanel, in, kPanel}, given.options());
  const float* from = given.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  constexpr auto kWeight = weight_matrix();
  at::parallel_for(0, out * in, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* taps = from + i * kTaps * kTaps;
      float* at = to + (i / in / kPanel * in + i % in) * kPanel + i / in % kPanel;
      for (int down = 0; down < kPoints; ++down) {
        for (int across = 0; across < kPoints; ++across, at += out * in) {
          double sum = 0;
          for (int tap = 0; tap < kTaps * kTaps; ++tap) {
            sum += kWeight[down][tap / kTaps] * kWeight[across][tap % kTaps] * taps[tap];
          }
          *at = static_cast<float>(sum);
        }
      }
    }
  });
  return packed;
}

// Numbers from one position of a map to the next, if its channels are side by side and its positions at equal
// distances; else 0. The stride of a dimension of size 1 says nothing.
int64_t distance_of_positions(const at::Tensor& x) {
  int64_t pixel = x.size(1), positions = 1;
  for (const int64_t dimension : {3, 2, 0}) {
    if (x.size(dimension) == 1) continue;
    if (positions == 1) pixel = x.stride(dimension);
    if (x.stride(dimension) != pixel * positions) return 0;
    positions *= x.size(dimension);
  }
  return (x.stride(1) == 1 || x.size(1) == 1) && pixel >= x.size(1) ? pixel : 0;
}

at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_processor();
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == kPoints * kPoints && weight.size(3) == kPanel &&
                  weight.scalar_type() == at::kFloat && weight.is_contiguous(),
              "conv3x3: the weight is not one of pack_conv3x3, got ", weight.sizes());
  const int64_t channels = weight.size(1) * kPanel;
  TORCH_CHECK(x.dim() == 4 && x.size(1) == weight.size(2), "conv3x3: the map must be (N, ", weight.size(2),
              ", H, W), got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat, "conv3x3: the map must be float32, got ", x.scalar_type());
  TORCH_CHECK(bias.sizes() == at::IntArrayRef({channels}) && bias.scalar_type() == at::kFloat,
              "conv3x3: the bias must be float32 (", channels, "), got ", bias.sizes());
  at::Tensor map = x;
  if (distance_of_positions(map) == 0) map = at::empty_like(x, at::MemoryFormat::ChannelsLast).copy_(x);
  const at::Tensor shift = bias.contiguous();
  at::Tensor out = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  if (out.numel() > 0) {
    convolve({map.const_data_ptr<float>(), map.size(0), map.size(1), map.size(2), map.size(3), distance_of_positions(map)},
             weight.const_data_ptr<float>(),
             {out.mutable_data_ptr<float>(), channels, shift.const_data_ptr<float>()});
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) {
  m.impl("pack_conv3x3", &pack_conv3x3_cpu);
  m.impl("conv3x3", &conv3x3_cpu);
}

}  // namespace refdet
