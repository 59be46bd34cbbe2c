// Products of matrices in float32 whose right side, the weights of a layer, is packed once and used often.
#pragma once

#include <cstdint>

namespace refdet {

constexpr int64_t kPanel = 16;   // columns of the right side that lie together, row by row
constexpr int64_t kDepth = 256;  // rows of the right side that are used at once: 16 kB of a panel, half of the first cache

// Whether this processor has the instructions it is compiled for.
bool can_multiply();

// c (rows x 16) = a (rows x depth) times panel (depth x 16), or with `add` c plus that. Rows of `a` lie `a_row` apart,
// rows of `c` `c_row`. Each number is one chain of fused multiply-adds over depth, whatever the number of rows and
// the processor, so that work which is cut otherwise gives the same bits.
void multiply(const float* a, int64_t a_row, const float* panel, int64_t depth, int64_t rows, float* c, int64_t c_row,
              bool add);

}  // namespace refdet
