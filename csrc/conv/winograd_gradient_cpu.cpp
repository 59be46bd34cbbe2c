// Gradient of the weights of 3x3 convolutions on the CPU: float32, stride 1, padding 1, channels in multiples of 16.
//
// The transpose of the algorithm in winograd_cpu.cpp, with tiles of 4x4 outputs: the tiles of the input and of the
// output's gradient are transformed to 36 points; at each point a matrix product over the tiles, by the BLAS of
// PyTorch; and the transpose of the weight transform. Tiles go through the first two steps in chunks that stay in the
// caches.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "common/simd.h"
#include "conv/positions.h"
#include "conv/winograd.h"
#include "conv/winograd_transforms.h"

namespace refdet {
namespace {

constexpr int64_t kAllPoints = kPoints * kPoints;
constexpr int kTile = 4;  // outputs of a tile along an axis
constexpr int64_t kTilesAtOnce = 256;

constexpr auto kOutputTransposed = [] {
  Matrix<kPoints, kTile> matrix = {};
  for (int point = 0; point < kPoints; ++point) {
    for (int result = 0; result < kTile; ++result) matrix[point][result] = kOutput<kTile>[result][point];
  }
  return matrix;
}();

// The tiles of a map; each begins `margin` rows and columns before its outputs, 1 for inputs and 0 for gradients.
struct Grid {
  int64_t down, across, margin;

  Grid(const Positions<float>& x, int64_t margin)
      : down((x.height + kTile - 1) / kTile), across((x.width + kTile - 1) / kTile), margin(margin) {}
};

// Values of tiles at the points, (36, tiles, channels). Points are padded by a vector: otherwise the values of a tile
// would all map to the same cache set.
struct Points {
  at::Tensor values;
  int64_t tiles, channels;

  Points(int64_t tiles, int64_t channels)
      : values(at::empty({kAllPoints, tiles * channels + kLanes})), tiles(tiles), channels(channels) {}

  // Values of a tile at the first point.
  float* of(int64_t tile) const { return values.mutable_data_ptr<float>() + tile * channels; }
  int64_t point_stride() const { return tiles * channels + kLanes; }
  // Values of the first `count` tiles, (36, count, channels).
  at::Tensor first(int64_t count) const {
    return values.as_strided({kAllPoints, count, channels}, {point_stride(), channels, 1});
  }
};

// Transforms one tile along both axes and writes its values at the points, `point_stride` elements apart.
template <const auto& matrix>
REFDET_INLINE void to_points(const Positions<float>& x, const Grid& grid, int64_t tile, float* points,
                             int64_t point_stride) {
  const int64_t column = tile % grid.across, row = tile / grid.across % grid.down;
  const float* image = x.data + tile / grid.across / grid.down * x.height * x.width * x.stride;
  for (int64_t c = 0; c < x.channels; c += kLanes) {
    transform_tile<matrix, matrix>(x, image, kTile * row - grid.margin, kTile * column - grid.margin, c,
                                   [&](int i, int j, const Floats& value) __attribute__((always_inline)) {
                                     store(value, points + (i * kPoints + j) * point_stride + c);
                                   });
  }
}

template <const auto& matrix>
REFDET_AVX2 void to_points_avx2(const Positions<float>& x, const Grid& grid, int64_t tile, float* points,
                                int64_t point_stride) {
  to_points<matrix>(x, grid, tile, points, point_stride);
}

template <const auto& matrix>
REFDET_AVX512 void to_points_avx512(const Positions<float>& x, const Grid& grid, int64_t tile, float* points,
                                    int64_t point_stride) {
  to_points<matrix>(x, grid, tile, points, point_stride);
}

// Transforms the tiles [begin, end).
template <const auto& matrix>
void transform_tiles(const Positions<float>& x, const Grid& grid, int64_t begin, int64_t end, const Points& points) {
  const auto transform = has_avx512() ? to_points_avx512<matrix> : to_points_avx2<matrix>;
  at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile)
      transform(x, grid, tile, points.of(tile - begin), points.point_stride());
  });
}

// The matrix (36, 9) from the 9 weights of a filter to its values at the points.
at::Tensor weight_transform() {
  constexpr auto kMatrix = weight_matrix();
  const at::Tensor products = at::empty({kPoints, kPoints, kTaps, kTaps});
  auto values = products.accessor<float, 4>();
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      for (int y = 0; y < kTaps; ++y) {
        for (int x = 0; x < kTaps; ++x) values[i][j][y][x] = static_cast<float>(kMatrix[i][y] * kMatrix[j][x]);
      }
    }
  }
  return products.view({kAllPoints, kTaps * kTaps});
}

at::Tensor conv3x3_weight_gradient_cpu(const at::Tensor& x, const at::Tensor& gradient) {
  TORCH_CHECK(x.dim() == 4 && gradient.dim() == 4 && x.size(0) == gradient.size(0) && x.size(2) == gradient.size(2) &&
                  x.size(3) == gradient.size(3),
              "conv3x3_weight_gradient: the gradient ", gradient.sizes(), " is not that of an input ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat && gradient.scalar_type() == at::kFloat,
              "conv3x3_weight_gradient: maps must be float32");
  TORCH_CHECK(x.size(1) % kLanes == 0 && gradient.size(1) % kLanes == 0,
              "conv3x3_weight_gradient: channels must be multiples of ", kLanes);
  const at::Tensor input_map = with_even_positions(x), output_map = with_even_positions(gradient);
  const Positions<float> inputs(input_map), outputs(output_map);
  const Grid input_grid(inputs, 1), output_grid(outputs, 0);
  const int64_t tiles = inputs.images * input_grid.down * input_grid.across;
  const int64_t chunks = std::max<int64_t>((tiles + kTilesAtOnce / 2) / kTilesAtOnce, 1);
  const int64_t chunk = (tiles + chunks - 1) / chunks;
  const Points left(chunk, outputs.channels), right(chunk, inputs.channels);
  const at::Tensor products = at::zeros({kAllPoints, outputs.channels, inputs.channels});
  for (int64_t begin = 0; begin < tiles; begin += chunk) {
    const int64_t end = std::min(begin + chunk, tiles);
    transform_tiles<kOutputTransposed>(outputs, output_grid, begin, end, left);
    transform_tiles<kInput<kTile>>(inputs, input_grid, begin, end, right);
    products.baddbmm_(left.first(end - begin).transpose(1, 2), right.first(end - begin));
  }
  static const at::Tensor transform = weight_transform().t();
  return at::mm(transform, products.flatten(1))
      .view({kTaps, kTaps, outputs.channels, inputs.channels})
      .permute({2, 3, 0, 1});
}

}  // namespace

TORCH_LIBRARY_IMPL(refdet, CPU, m) { m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_cpu); }

}  // namespace refdet
