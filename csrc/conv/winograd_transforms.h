// The transforms of Winograd's minimal filtering (winograd.h) on vectors of channels.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "conv/positions.h"
#include "conv/winograd.h"

namespace refdet {

// to[i * to_step] = sum over j of matrix[i][j] from[j * from_step], with a compile-time matrix.
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

// Transforms a tile of a map along both axes, for kLanes channels from `c` on: `store(i, j, value)` gets the value of
// each row of `down` and row of `across`. The tile has as many inputs as these matrices have columns; inputs
// outside the map are 0.
template <const auto& down, const auto& across, typename Map, typename Store>
REFDET_INLINE void transform_tile(const Positions<Map>& x, const Map* image, int64_t top, int64_t left, int64_t c,
                                  const Store& store) {
  constexpr int kDown = down.size(), kAcross = across.size(), kHigh = down[0].size(), kWide = across[0].size();
  Floats inputs[kHigh][kWide], half[kDown][kWide], values[kAcross];
  for (int i = 0; i < kHigh; ++i) {
    for (int j = 0; j < kWide; ++j) {
      const int64_t at_y = top + i, at_x = left + j;
      inputs[i][j] = Floats{};
      if (at_y >= 0 && at_y < x.height && at_x >= 0 && at_x < x.width) {
        load(image + (at_y * x.width + at_x) * x.stride + c, inputs[i][j]);
      }
    }
  }
  for (int j = 0; j < kWide; ++j) apply<down>(&inputs[0][j], kWide, &half[0][j], kWide);
  for (int i = 0; i < kDown; ++i) {
    apply<across>(half[i], 1, values, 1);
    for (int j = 0; j < kAcross; ++j) store(i, j, values[j]);
  }
}

}  // namespace refdet
