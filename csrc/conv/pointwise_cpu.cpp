// 1x1 convolutions for inference on the CPU, fused with bias, shortcut and ReLU; channels in multiples of 16. Each is a
// matrix product of positions and weights (gemm.h).
//
// Cost: one pass over the map, the shortcut and the result, and one over the weights per several hundred positions.
//
// Speed: positions are packed once and multiplied with all weights, sums stay in the L1 and L2 caches until they are
// complete, and nothing goes through memory between the product and the ReLU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "conv/gemm.h"
#include "conv/positions.h"
#include "conv/scales.h"
#include "conv/weights.h"

namespace refdet {
namespace {

constexpr int64_t kRows = 48, kWidth = 128;  // positions and output channels whose sums are held at once: 24 kB
constexpr int64_t kMaxRows = 5 * kRows;

template <typename Product>
struct Result {
  typename Product::Map* data;
  int64_t channels;
  const float *scale, *bias;              // of each channel
  const typename Product::Map* shortcut;  // or null; is added before ReLU
  int64_t shortcut_stride;
  bool relu;
};

// Buffers for a block of positions, and for sums.
template <typename Product>
struct Block {
  Scratch<typename Product::A> left;  // the packed positions: in slices of kDepth channels, each slice by position
  Scratch<float> scale;               // of each position, the factor that undoes its scaling; unused without kScaled
  Scratch<float> sums;                // kWidth sums for each of kRows positions

  Block(int64_t rows, int64_t depth) : left(rows * depth), scale(rows), sums(kRows * kWidth) {}
};

// Packs the positions [first, first + rows) of a map into `block`.
template <typename Product>
REFDET_INLINE void pack_rows(const Positions<typename Product::Map>& x, int64_t first, int64_t rows,
                             Block<Product>& block) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto* from = x.data + (first + row) * x.stride;
    float scale = 1;
    if constexpr (Product::kScaled) {
      MaxMagnitude magnitude;
      magnitude.update(from, x.channels);
      scale = scale_to(Product::kMaxValue, magnitude);
      block.scale.data()[row] = 1 / scale;
    }
    for (int64_t slice = 0; slice < x.channels; slice += Product::kDepth) {
      const int64_t depth = std::min(Product::kDepth, x.channels - slice);
      auto* to = block.left.data() + slice * rows + row * depth;
      for (int64_t c = 0; c < depth; c += kLanes) {
        Floats values;
        load(from + slice + c, values);
        store(Product::kScaled ? values * scale : values, to + c);
      }
    }
  }
}

// A tile of a block: a range of its positions and of output channels.
struct Tile {
  int64_t row, rows, channel, width;
};

// Writes the results of a tile from its sums; its block begins at the position `first`.
template <typename Product>
REFDET_INLINE void finish_rows(const Block<Product>& block, int64_t first, const Tile tile, const Result<Product> y) {
  const int64_t channel = tile.channel;
  const float *sums = block.sums.data(), *scales = block.scale.data() + tile.row;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t position = first + tile.row + row;
    auto* to = y.data + position * y.channels + channel;
    const auto* shortcut = y.shortcut == nullptr ? nullptr : y.shortcut + position * y.shortcut_stride + channel;
    for (int64_t c = 0; c < tile.width; c += kLanes) {
      Floats sum, bias;
      load(sums + row * kWidth + c, sum);
      load(y.bias + channel + c, bias);
      if constexpr (Product::kScaled) {
        Floats scale;
        load(y.scale + channel + c, scale);
        sum = sum * scales[row] * scale;  // scales[row] * scale alone may overflow
      }
      sum += bias;
      if (shortcut != nullptr) {
        Floats other;
        load(shortcut + c, other);
        sum += other;
      }
      if (y.relu) relu(sum);
      store(sum, to + c);
    }
  }
}

REFDET_AVX2 void pack_block_avx2(const Positions<float>& x, int64_t first, int64_t rows, Block<Single>& block) {
  pack_rows(x, first, rows, block);
}

REFDET_AVX512 void pack_block_avx512(const Positions<float>& x, int64_t first, int64_t rows, Block<Single>& block) {
  pack_rows(x, first, rows, block);
}

void pack_block(const Positions<float>& x, int64_t first, int64_t rows, Block<Single>& block) {
  (has_avx512() ? pack_block_avx512 : pack_block_avx2)(x, first, rows, block);
}

REFDET_AVX2 void finish_tile_avx2(const Block<Single>& block, int64_t first, const Tile& tile,
                                  const Result<Single>& y) {
  finish_rows(block, first, tile, y);
}

REFDET_AVX512 void finish_tile_avx512(const Block<Single>& block, int64_t first, const Tile& tile,
                                      const Result<Single>& y) {
  finish_rows(block, first, tile, y);
}

void finish_tile(const Block<Single>& block, int64_t first, const Tile& tile, const Result<Single>& y) {
  (has_avx512() ? finish_tile_avx512 : finish_tile_avx2)(block, first, tile, y);
}

#ifdef REFDET_FLOAT16
REFDET_FLOAT16 void pack_block(const Positions<c10::BFloat16>& x, int64_t first, int64_t rows, Block<Half>& block) {
  pack_rows(x, first, rows, block);
}

REFDET_FLOAT16 void finish_tile(const Block<Half>& block, int64_t first, const Tile& tile, const Result<Half>& y) {
  finish_rows(block, first, tile, y);
}
#endif

// Positions per block: as many as fit in the L2 cache together with the weights, balanced over the threads.
int64_t rows_of_block(int64_t positions, int64_t depth) {
  const int64_t values = has_avx512() ? 1 << 18 : 1 << 17;  // of 4 bytes
  const int64_t max_rows = std::clamp(values / depth, kRows, kMaxRows), threads = at::get_num_threads();
  const int64_t rounds = (positions + max_rows * threads - 1) / (max_rows * threads);
  const int64_t rows = (positions + rounds * threads - 1) / (rounds * threads);
  return (rows + kRows / 4 - 1) / (kRows / 4) * (kRows / 4);
}

template <typename Product>
void multiply_positions(const Positions<typename Product::Map>& x, const typename Product::B* weights,
                        const Result<Product>& y) {
  const int64_t positions = x.count(), block_rows = rows_of_block(positions, x.channels);
  const auto start = [&] { return Block<Product>(block_rows, x.channels); };
  parallel_tasks((positions + block_rows - 1) / block_rows, start, [&](Block<Product>& block, int64_t piece) {
    const int64_t first = piece * block_rows, rows = std::min(block_rows, positions - first);
    pack_block(x, first, rows, block);
    for (int64_t channel = 0; channel < y.channels; channel += kWidth) {
      for (int64_t row = 0; row < rows; row += kRows) {
        const Tile tile{row, std::min(kRows, rows - row), channel, std::min(kWidth, y.channels - channel)};
        for (int64_t k = 0; k < x.channels; k += Product::kDepth) {
          const int64_t depth = std::min(Product::kDepth, x.channels - k);
          Product::multiply(block.left.data() + k * rows + row * depth, depth,
                            weights + channel * x.channels + k * Product::kPanel, x.channels * Product::kPanel,
                            tile.width / Product::kPanel, depth, tile.rows, block.sums.data(), kWidth, k > 0);
        }
        finish_tile(block, first, tile, y);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> pack_conv1x1_cpu(const at::Tensor& weight, bool half) {
  TORCH_CHECK(weight.dim() == 2, "conv1x1: the weight must be (K, C), got ", weight.sizes());
  check_weight("conv1x1", weight, half);
  return pack(weight.contiguous().unsqueeze(0), half);
}

template <typename Product>
at::Tensor run_conv1x1(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bias,
                       const std::optional<at::Tensor>& shortcut, bool relu) {
  using Map = typename Product::Map;
  const int64_t channels = check_packed<Product>("conv1x1", x, weight, scale, bias, 1);
  const at::Tensor map = with_even_positions(x), scales = scale.contiguous(), shift = bias.contiguous();
  at::Tensor out = at::empty({x.size(0), channels, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor addend;
  if (shortcut.has_value()) {
    TORCH_CHECK(shortcut->sizes() == out.sizes() && shortcut->scalar_type() == out.scalar_type(),
                "conv1x1: the shortcut must be ", out.scalar_type(), " ", out.sizes(), " like the result, got ",
                shortcut->scalar_type(), " ", shortcut->sizes());
    addend = with_even_positions(*shortcut);
  }
  if (out.numel() > 0) {
    multiply_positions<Product>(
        Positions<Map>(map), weight.const_data_ptr<typename Product::B>(),
        {out.mutable_data_ptr<Map>(), channels, scales.const_data_ptr<float>(), shift.const_data_ptr<float>(),
         addend.defined() ? addend.const_data_ptr<Map>() : nullptr, addend.defined() ? position_stride(addend) : 0,
         relu});
  }
  return out;
}

at::Tensor conv1x1_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& bias,
                       const std::optional<at::Tensor>& shortcut, bool relu) {
#ifdef REFDET_FLOAT16
  if (weight.scalar_type() == at::kHalf) return run_conv1x1<Half>(x, weight, scale, bias, shortcut, relu);
#endif
  return run_conv1x1<Single>(x, weight, scale, bias, shortcut, relu);
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) {
  m.impl("pack_conv1x1", &pack_conv1x1_cpu);
  m.impl("conv1x1", &conv1x1_cpu);
}

}  // namespace refdet
