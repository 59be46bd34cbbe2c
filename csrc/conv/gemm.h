// Matrix products with a prepacked right-hand side, the weights of a layer: in float32, and in float16 on processors
// with AVX512-FP16.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace refdet {

// Maps, weights and sums in float32. Each result is one chain of fused multiply-adds over depth, for any number of rows
// and any processor, so that it is bit-identical however the work is split.
struct Single {
  using Map = float;                      // the type of feature maps between layers
  using A = float;                        // of the left-hand side
  using B = float;                        // of the right-hand side
  static constexpr bool kScaled = false;  // whether both sides are multiplied by scale factors
  static constexpr int64_t kPanel = 16;   // columns of the right-hand side stored together, row by row
  static constexpr int64_t kDepth = 256;  // rows of a panel used at a time, so that they stay in the L1 cache

  // Whether this processor supports `multiply`.
  static bool is_supported();

  // c = a b, or c += a b with `add`, where a is (rows, depth), b is stored as `panels` panels (depth, 16) that begin
  // `panel_stride` elements apart, and c is (rows, 16 * panels). As in BLAS, rows of a and c are `lda` and
  // `ldc` elements apart. `depth` is a multiple of 4.
  static void multiply(const float* a, int64_t lda, const float* panel, int64_t panel_stride, int64_t panels,
                       int64_t depth, int64_t rows, float* c, int64_t ldc, bool add);
};

// Maps in bfloat16, products in float16: twice the throughput of float32, and 3 bits more than bfloat16. kRun products
// are summed in float16, and those sums in float32. Every row of `a` and every column of a panel is scaled by a power
// of two to stay in the range of float16: the values of a row are at most kMaxValue, and kRun values of a column sum up
// to at most kMaxColumnSum.
struct Half {
  using Map = c10::BFloat16;
  using A = uint32_t;  // a float16 value twice, which broadcasts to a vector faster than a single one
  using B = c10::Half;
  static constexpr bool kScaled = true;
  static constexpr int64_t kPanel = 64;
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kRun = 64;  // products summed in float16
  // The product of both, which bounds a sum of kRun products, is half of what float16 can hold.
  static constexpr float kMaxValue = 256, kMaxColumnSum = 128;

  static bool is_supported();

  // As `Single::multiply`.
  static void multiply(const uint32_t* a, int64_t lda, const c10::Half* panel, int64_t panel_stride, int64_t panels,
                       int64_t depth, int64_t rows, float* c, int64_t ldc, bool add);
};

// Whether the processor has AMX for bfloat16, which PyTorch uses and these kernels do not. False if `Half` was not
// compiled.
bool has_matrix_units();

}  // namespace refdet
