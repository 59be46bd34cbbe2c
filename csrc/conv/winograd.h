// Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016) for 3x3
// convolutions: the transform matrices, and the tiling of an axis.
//
// 4 results of a convolution with 3 weights take 6 products, at 6 points, instead of 12; 3 results take 5 instead of 9.
// Along both axes that is about a quarter of the products, each summed over all channels. 3 results use 5 of the same 6
// points, so that one set of weights serves tiles of both sizes, and an axis of 7 = 4 + 3 results needs no padding.
//
// The points are 0, 3/4, -3/4, 3/2, infinity and -3/2. All matrices but that of the weights are exact in float32, and
// these points have small rounding errors: with 512 channels 5 times that of the plain float32 sum, compared with 9
// times for the usual 0, 1, -1, 2, -2 and infinity.
#pragma once

#include <array>
#include <cstdint>

namespace refdet {

constexpr int kPoints = 6;         // of an axis, for a tile of 4 results; one of 3 uses the first 5
constexpr int kInfinityPoint = 4;  // index of infinity among the points
constexpr int kTaps = 3;           // weights along an axis
// The entry at kInfinityPoint is unused.
constexpr std::array<double, kPoints> kPointValues = {0, 0.75, -0.75, 1.5, 0, -1.5};

template <int rows, int columns>
using Matrix = std::array<std::array<float, columns>, rows>;

// The coefficients, in ascending order, of the product of (x - point) over all finite points among the first `used`,
// except `excluded`.
template <int used>
constexpr std::array<double, kPoints> product_of_others(int excluded) {
  std::array<double, kPoints> product = {1};
  for (int other = 0; other < used; ++other) {
    if (other == excluded || other == kInfinityPoint) continue;
    for (int power = kPoints - 1; power >= 0; --power) {
      product[power] = (power > 0 ? product[power - 1] : 0) - kPointValues[other] * product[power];
    }
  }
  return product;
}

// Input transform along an axis, for a tile of `results`.
template <int results>
constexpr auto input_matrix() {
  constexpr int kUsed = results + kTaps - 1;
  Matrix<kUsed, kUsed> matrix = {};
  for (int point = 0; point < kUsed; ++point) {
    // weight_matrix divides by the differences to all other finite points; a tile that omits some multiplies by theirs
    double missing = 1;
    for (int other = kUsed; other < kPoints && point != kInfinityPoint; ++other)
      missing *= kPointValues[point] - kPointValues[other];
    const auto product = product_of_others<kUsed>(point);
    for (int input = 0; input < kUsed; ++input) matrix[point][input] = static_cast<float>(missing * product[input]);
  }
  return matrix;
}

// Upper bound of the largest value at a point, relative to the largest input of the tile; a power of two.
constexpr float kGrowth = 64;

template <int results>
constexpr bool growth_is_bounded() {
  float max_sum = 0;
  for (const auto& row : input_matrix<results>()) {
    float sum = 0;
    for (const float value : row) sum += value < 0 ? -value : value;
    max_sum = sum > max_sum ? sum : max_sum;
  }
  return max_sum * max_sum <= kGrowth;
}
static_assert(growth_is_bounded<3>() && growth_is_bounded<4>());

// Output transform along an axis.
template <int results>
constexpr auto output_matrix() {
  constexpr int kUsed = results + kTaps - 1;
  Matrix<results, kUsed> matrix = {};
  for (int point = 0; point < kUsed; ++point) {
    double power = 1;
    for (int result = 0; result < results; ++result, power *= kPointValues[point]) {
      matrix[result][point] = static_cast<float>(point == kInfinityPoint ? result == results - 1 : power);
    }
  }
  return matrix;
}

// Weight transform along an axis, in float64, since most values are not exact in float32.
constexpr std::array<std::array<double, kTaps>, kPoints> weight_matrix() {
  std::array<std::array<double, kTaps>, kPoints> matrix = {};
  for (int point = 0; point < kPoints; ++point) {
    if (point == kInfinityPoint) {
      matrix[point][kTaps - 1] = 1;
      continue;
    }
    double divisor = 1;
    for (int other = 0; other < kPoints; ++other) {
      if (other != point && other != kInfinityPoint) divisor *= kPointValues[point] - kPointValues[other];
    }
    double power = 1;
    for (int tap = 0; tap < kTaps; ++tap, power *= kPointValues[point]) matrix[point][tap] = power / divisor;
  }
  return matrix;
}

// Tiles along an axis: first tiles of 4 results, then tiles of 3, with the fewest products in total.
struct Tiles {
  int64_t fours = 0, threes = 0;

  explicit Tiles(int64_t length) {
    int64_t best = 0;
    for (int64_t threes = 0; threes < 4; ++threes) {
      const int64_t rest = length - 3 * threes, fours = rest > 0 ? (rest + 3) / 4 : 0, cost = 6 * fours + 5 * threes;
      if (threes == 0 || cost < best) best = cost, this->fours = fours, this->threes = threes;
    }
  }

  int64_t count() const { return fours + threes; }
  // Number of tiles that use a point: the tiles of 3 do not use the last one.
  int64_t count_using(int point) const { return point < kPoints - 1 ? count() : fours; }
  bool is_four(int64_t tile) const { return tile < fours; }
  // Index of the first result of a tile.
  int64_t start(int64_t tile) const { return 3 * tile + (is_four(tile) ? tile : fours); }
};

}  // namespace refdet
