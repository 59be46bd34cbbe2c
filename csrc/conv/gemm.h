// Products of matrices whose right side, the weights of a layer, is packed once and used often: in float32, and on
// processors with AVX512-FP16 in float16.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace refdet {

// Maps, weights and sums in float32. Each number is one chain of fused multiply-adds over depth, whatever the number
// of rows and the processor, so that work which is cut otherwise gives the same bits.
struct Single {
  using Map = float;  // what layers give each other
  using A = float;
  using B = float;
  static constexpr bool kScaled = false;
  static constexpr int64_t kPanel = 16;   // columns of the right side that lie together, row by row
  static constexpr int64_t kDepth = 256;  // rows of it that are used at once, so that they stay in the first cache

  // Whether this processor has the instructions it is compiled for.
  static bool can();

  // c (rows x 16 panels) = a (rows x depth) times `panels` panels (depth x 16) that lie `distance` apart, or with `add`
  // c plus that. Rows of `a` lie `a_row` apart, rows of `c` `c_row`. depth is a multiple of 4.
  static void multiply(const float* a, int64_t a_row, const float* panel, int64_t distance, int64_t panels,
                       int64_t depth, int64_t rows, float* c, int64_t c_row, bool add);
};

// Maps in bfloat16, products of float16 numbers: twice as many multiply-adds in a second as in float32, and 3 bits more
// than bfloat16 has. Sums of kRun products are float16 too, and sums of those float32. So that neither side and no sum
// leaves what float16 can hold, every row of `a` and every column of a panel is scaled by a power of two: the numbers
// of a row are at most kLargest, and kRun numbers of a column together at most kHeaviest.
struct Half {
  using Map = c10::BFloat16;
  using A = uint32_t;  // a float16 number twice, which is quicker to spread over a vector than one alone
  using B = c10::Half;
  static constexpr bool kScaled = true;
  static constexpr int64_t kPanel = 64;
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kRun = 64;
  static constexpr float kLargest = 256, kHeaviest = 128;  // their product is half of what float16 can hold

  static bool can();

  // As that of `Single`.
  static void multiply(const uint32_t* a, int64_t a_row, const c10::Half* panel, int64_t distance, int64_t panels,
                       int64_t depth, int64_t rows, float* c, int64_t c_row, bool add);
};

// Whether the processor multiplies matrices of bfloat16 numbers as a whole (AMX), which nothing here does; false where
// there are no kernels for `Half`.
bool has_matrix_units();

}  // namespace refdet
