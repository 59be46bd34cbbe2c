// The product of a few rows and a few panels: the inner loop of all convolutions.
//
// Speed: 6 rows x 16 columns (AVX2), 6 x 64 (AVX-512) or 6 x 128 (AVX512-FP16) of the result stay in registers over
// depth; each step reads one row of the panels and one value of each row of `a` from the L1 and L2 caches, and is all
// fused multiply-adds. With hyper-threading, keeping other instructions few matters most.

#include "common/simd.h"
#include "conv/gemm.h"

#ifdef REFDET_FLOAT16
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // values that this header leaves undefined on purpose
#endif

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

// With the alignment of a scalar, for unaligned loads.
using Vector8 = float __attribute__((vector_size(8 * sizeof(float)), aligned(alignof(float)), may_alias));
using Vector16 = float __attribute__((vector_size(16 * sizeof(float)), aligned(alignof(float)), may_alias));

constexpr int kUnrolled = 4;  // steps over depth in one iteration
constexpr int kTogether = 4;  // rows addressed from one pointer

// Pointers into `rows` rows of the left-hand side: one per group of kTogether rows, hidden from the optimizer, which
// would otherwise keep a pointer for every row and step, more than there are registers. `row` is the stride of rows.
template <typename A, int rows>
struct RowGroups {
  static constexpr int kGroups = (rows + kTogether - 1) / kTogether;
  const A* group[kGroups];
  int64_t row;

  REFDET_INLINE RowGroups(const A* a, int64_t row) : row(row) {
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) group[i] = a + i * kTogether * row;
    hide();
  }
  REFDET_INLINE void advance() {
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) group[i] += kUnrolled;
    hide();
  }
  REFDET_INLINE A value(int r, int step) const { return group[r / kTogether][r % kTogether * row + step]; }

 private:
  REFDET_INLINE void hide() {
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) asm("" : "+r"(group[i]));
  }
};

// Multiplies `rows` rows by `vectors` vectors of columns, `panel_stride` apart: one per panel or, with AVX2, the two
// halves of a panel. All loops but the one over depth are unrolled, or the sums would spill to memory.
template <typename Vector, int vectors, int rows>
REFDET_INLINE void multiply_rows(const float* a, int64_t lda, const float* panel, int64_t panel_stride, int64_t depth,
                                 float* c, int64_t ldc, bool add) {
  constexpr int kStep = sizeof(Vector) / sizeof(float);
  const auto result = [&](int r, int v) { return reinterpret_cast<Vector*>(c + r * ldc + v * kStep); };
  const Vector* right[vectors];
  Vector sum[rows][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) right[v] = reinterpret_cast<const Vector*>(panel + v * panel_stride);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[r][v] = add ? *result(r, v) : Vector{};
  }
  RowGroups<float, rows> groups(a, lda);
  for (int64_t k = 0; k < depth; k += kUnrolled, groups.advance()) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnrolled; ++u) {
      Vector columns[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) columns[v] = right[v][(k + u) * (Single::kPanel / kStep)];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] += groups.value(r, u) * columns[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) *result(r, v) = sum[r][v];
  }
}

// All rows, `max_rows` at a time; the remainder in half as many, a quarter and so on.
template <typename Vector, int vectors, int max_rows>
REFDET_INLINE void multiply_all(const float* a, int64_t lda, const float* panel, int64_t panel_stride, int64_t depth,
                                int64_t rows, float* c, int64_t ldc, bool add) {
  for (; rows >= max_rows; rows -= max_rows, a += max_rows * lda, c += max_rows * ldc) {
    multiply_rows<Vector, vectors, max_rows>(a, lda, panel, panel_stride, depth, c, ldc, add);
  }
  if constexpr (max_rows > 1) {
    multiply_all<Vector, vectors, max_rows / 2>(a, lda, panel, panel_stride, depth, rows, c, ldc, add);
  }
}

__attribute__((target("avx2,fma"))) void multiply_avx2(const float* a, int64_t lda, const float* panel,
                                                       int64_t panel_stride, int64_t panels, int64_t depth,
                                                       int64_t rows, float* c, int64_t ldc, bool add) {
  for (int64_t p = 0; p < panels; ++p, panel += panel_stride, c += Single::kPanel) {
    multiply_all<Vector8, 2, 6>(a, lda, panel, 8, depth, rows, c, ldc, add);
  }
}

// A run of four panels stays in the L1 cache over all rows.
REFDET_AVX512 void multiply_avx512(const float* a, int64_t lda, const float* panel, int64_t panel_stride,
                                   int64_t panels, int64_t depth, int64_t rows, float* c, int64_t ldc, bool add) {
  constexpr int64_t kRun = 64;
  for (int64_t k = 0; k < depth; k += kRun, add = true) {
    const int64_t run = depth - k < kRun ? depth - k : kRun;
    const float* right = panel + k * Single::kPanel;
    int64_t p = 0;
    for (; p + 4 <= panels; p += 4) {
      multiply_all<Vector16, 4, 6>(a + k, lda, right + p * panel_stride, panel_stride, run, rows,
                                   c + p * Single::kPanel, ldc, add);
    }
    for (; p < panels; ++p) {
      multiply_all<Vector16, 1, 12>(a + k, lda, right + p * panel_stride, panel_stride, run, rows,
                                    c + p * Single::kPanel, ldc, add);
    }
  }
}

}  // namespace

bool Single::is_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

void Single::multiply(const float* a, int64_t lda, const float* panel, int64_t panel_stride, int64_t panels,
                      int64_t depth, int64_t rows, float* c, int64_t ldc, bool add) {
  (has_avx512() ? multiply_avx512 : multiply_avx2)(a, lda, panel, panel_stride, panels, depth, rows, c, ldc, add);
}

#else

bool Single::is_supported() { return false; }

void Single::multiply(const float*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t, float*, int64_t, bool) {}

#endif

#ifdef REFDET_FLOAT16
namespace {

// sum += a * b. In assembly, as the compiler would move sums and factors between the few free registers and spill some
// to memory.
REFDET_FLOAT16 REFDET_INLINE void multiply_add(const __m512h& a, const __m512h& b, __m512h& sum) {
  asm("vfmadd231ph %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// Multiplies `rows` rows by `panels` panels of two vectors each, for one run of at most kRun steps over depth. The same
// loop as `multiply_rows`, but with intrinsics: in a template, the compiler would widen _Float16 before it knows the
// target processor.
template <int rows, int panels>
REFDET_FLOAT16 REFDET_INLINE void multiply_half_rows(const uint32_t* a, int64_t lda, const c10::Half* panel,
                                                     int64_t panel_stride, int64_t depth, float* c, int64_t ldc,
                                                     bool add) {
  constexpr int kVectors = 2 * panels, kStep = Half::kPanel / 2;
  __m512h sum[rows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ph();
  }
  RowGroups<uint32_t, rows> groups(a, lda);
  for (int64_t k = 0; k < depth; k += kUnrolled, groups.advance()) {
    const c10::Half* right = panel + k * Half::kPanel;
#pragma GCC unroll 4
    for (int u = 0; u < kUnrolled; ++u, right += Half::kPanel) {
      __m512h columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_ph(right + v / 2 * panel_stride + v % 2 * kStep);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const auto value = _mm512_castsi512_ph(_mm512_set1_epi32(static_cast<int>(groups.value(r, u))));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) multiply_add(value, columns[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int part = 0; part < 2 * kVectors; ++part) {
      const __m512i bits = _mm512_castph_si512(sum[r][part / 2]);
      const __m256i half = part % 2 == 0 ? _mm512_castsi512_si256(bits) : _mm512_extracti64x4_epi64(bits, 1);
      const __m512 wide = _mm512_cvtph_ps(half);
      float* result = c + r * ldc + part * 16;
      _mm512_storeu_ps(result, add ? _mm512_add_ps(_mm512_loadu_ps(result), wide) : wide);
    }
  }
}

template <int max_rows, int panels>
REFDET_FLOAT16 REFDET_INLINE void multiply_half_all(const uint32_t* a, int64_t lda, const c10::Half* panel,
                                                    int64_t panel_stride, int64_t depth, int64_t rows, float* c,
                                                    int64_t ldc, bool add) {
  for (; rows >= max_rows; rows -= max_rows, a += max_rows * lda, c += max_rows * ldc) {
    multiply_half_rows<max_rows, panels>(a, lda, panel, panel_stride, depth, c, ldc, add);
  }
  if constexpr (max_rows > 1) {
    multiply_half_all<max_rows / 2, panels>(a, lda, panel, panel_stride, depth, rows, c, ldc, add);
  }
}

}  // namespace

bool Half::is_supported() { return has_float16(); }

bool has_matrix_units() { return __builtin_cpu_supports("amx-bf16"); }

// A run of a pair of panels stays in the L1 cache over all rows.
REFDET_FLOAT16 void Half::multiply(const uint32_t* a, int64_t lda, const c10::Half* panel, int64_t panel_stride,
                                   int64_t panels, int64_t depth, int64_t rows, float* c, int64_t ldc, bool add) {
  for (int64_t k = 0; k < depth; k += kRun, add = true) {
    const int64_t run = depth - k < kRun ? depth - k : kRun;
    const c10::Half* right = panel + k * kPanel;
    for (int64_t p = 0; p < panels; p += 2, right += 2 * panel_stride) {
      float* to = c + p * kPanel;
      if (panels - p >= 2) {
        multiply_half_all<6, 2>(a + k, lda, right, panel_stride, run, rows, to, ldc, add);
      } else {
        multiply_half_all<12, 1>(a + k, lda, right, panel_stride, run, rows, to, ldc, add);
      }
    }
  }
}

#else

bool Half::is_supported() { return false; }

bool has_matrix_units() { return false; }

void Half::multiply(const uint32_t*, int64_t, const c10::Half*, int64_t, int64_t, int64_t, int64_t, float*, int64_t,
                    bool) {}

#endif

}  // namespace refdet
