// SIMD vectors of channels: loads and stores as float32 or bfloat16, and function multiversioning.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

// Compiled for several instruction sets; the loader picks one. Without -mfma, so that all of them round alike.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define REFDET_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REFDET_SIMD
#endif
#define REFDET_INLINE inline __attribute__((always_inline))

// Compiled for one instruction set; the caller checks for support.
#if defined(__x86_64__) && defined(__GNUC__)
#define REFDET_AVX2 __attribute__((target("avx2")))
#define REFDET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define REFDET_AVX2
#define REFDET_AVX512
#endif

// Compiled for AVX512-FP16, if the compiler is known to support it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define REFDET_FLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512fp16,f16c,fma")))
#endif

namespace refdet {

constexpr int64_t kLanes = 16;  // channels in a vector

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using UInt16s = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// A scalar, for the remaining channels.
template <typename T>
REFDET_INLINE void load(const T* from, float& to) {
  to = static_cast<float>(*from);
}

template <typename T>
REFDET_INLINE void store(const float& from, T* to) {
  *to = static_cast<T>(from);
}

REFDET_INLINE void load(const float* from, Floats& to) { std::memcpy(&to, from, sizeof to); }

REFDET_INLINE void load(const c10::BFloat16* from, Floats& to) {
  UInt16s bits;
  std::memcpy(&bits, from, sizeof bits);
  const Words wide = __builtin_convertvector(bits, Words) << 16;
  std::memcpy(&to, &wide, sizeof to);
}

REFDET_INLINE void store(const Floats& from, float* to) { std::memcpy(to, &from, sizeof from); }

// Rounds to nearest, ties to even, as PyTorch does.
REFDET_INLINE void store(const Floats& from, c10::BFloat16* to) {
  Words bits;
  std::memcpy(&bits, &from, sizeof bits);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words is_number = from == from;  // all ones, or 0 for NaN
  const UInt16s narrow = __builtin_convertvector((rounded & is_number) | (~is_number & 0x7fc0), UInt16s);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
#else
  return false;
#endif
}

#ifdef REFDET_FLOAT16
inline bool has_float16() {
  static const bool has = __builtin_cpu_supports("avx512fp16");
  return has;
}

// As float16, each value twice.
REFDET_INLINE void store(const Floats& from, uint32_t* to) {
  using Float16s = _Float16 __attribute__((vector_size(kLanes * sizeof(_Float16))));
  const Float16s narrow = __builtin_convertvector(from, Float16s);
  UInt16s bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  Words twice = __builtin_convertvector(bits, Words);
  twice |= twice << 16;
  std::memcpy(to, &twice, sizeof twice);
}
#endif

// ReLU: 0 for negative values; NaN stays NaN. On integers: without AVX-512, compilers split a comparison of 16 values
// into scalar ones.
REFDET_INLINE void relu(Floats& x) {
  using Signed = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
  Signed bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Signed negative = bits >> 31, is_nan = (0x7f800000 - (bits & 0x7fffffff)) >> 31;  // all ones, or 0
  bits &= is_nan | ~negative;
  std::memcpy(&x, &bits, sizeof bits);
}

}  // namespace refdet
