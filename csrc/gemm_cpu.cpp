// The product of a few rows with a panel of 16 columns: the one loop that all convolutions of csrc spend their time in.
//
// Why fast: 6 rows x 16 columns (AVX2) or 12 x 16 (AVX-512) of the result stay in registers while depth goes by; each
// step reads one row of the panel and one number of each row of `a`, all of them from the first two caches, and does
// nothing but fused multiply-adds.

#include "gemm.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define REFDET_GEMM 1
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
#endif

namespace refdet {

#ifdef REFDET_GEMM
namespace {

// Aligned as single numbers are, so that they may be read anywhere.
using Vector8 = float __attribute__((vector_size(8 * sizeof(float)), aligned(alignof(float)), may_alias));
using Vector16 = float __attribute__((vector_size(16 * sizeof(float)), aligned(alignof(float)), may_alias));

// All loops but that over depth are unrolled, or the sums would live in memory.
template <typename Vector, int rows>
REFDET_INLINE void multiply_rows(const float* a, int64_t a_row, const float* panel, int64_t depth, float* c,
                                 int64_t c_row, bool add) {
  constexpr int kStep = sizeof(Vector) / sizeof(float), kVectors = kPanel / kStep;
  const auto result = [&](int r, int v) { return reinterpret_cast<Vector*>(c + r * c_row + v * kStep); };
  Vector sum[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = add ? *result(r, v) : Vector{};
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const auto* right = reinterpret_cast<const Vector*>(panel);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r * a_row + k] * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) *result(r, v) = sum[r][v];
  }
}

// All rows, `most` at a time, and the rest by halves of that.
template <typename Vector, int most>
REFDET_INLINE void multiply_all(const float* a, int64_t a_row, const float* panel, int64_t depth, int64_t rows,
                                float* c, int64_t c_row, bool add) {
  for (; rows >= most; rows -= most, a += most * a_row, c += most * c_row) {
    multiply_rows<Vector, most>(a, a_row, panel, depth, c, c_row, add);
  }
  if constexpr (most > 1) multiply_all<Vector, most / 2>(a, a_row, panel, depth, rows, c, c_row, add);
}

__attribute__((target("avx2,fma"))) void multiply_avx2(const float* a, int64_t a_row, const float* panel,
                                                       int64_t depth, int64_t rows, float* c, int64_t c_row,
                                                       bool add) {
  multiply_all<Vector8, 6>(a, a_row, panel, depth, rows, c, c_row, add);
}

__attribute__((target("avx512f"))) void multiply_avx512(const float* a, int64_t a_row, const float* panel,
                                                        int64_t depth, int64_t rows, float* c, int64_t c_row,
                                                        bool add) {
  multiply_all<Vector16, 12>(a, a_row, panel, depth, rows, c, c_row, add);
}

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f");
  return has;
}

}  // namespace

bool can_multiply() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

void multiply(const float* a, int64_t a_row, const float* panel, int64_t depth, int64_t rows, float* c, int64_t c_row,
              bool add) {
  (has_avx512() ? multiply_avx512 : multiply_avx2)(a, a_row, panel, depth, rows, c, c_row, add);
}

#else

bool can_multiply() { return false; }

void multiply(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool) {}

#endif

}  // namespace refdet
