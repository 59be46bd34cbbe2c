// Vectors of channels on the CPU: reading and writing them as float32 or bfloat16, and code for several processors.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

// Compiled for several processors, of which the loader picks one. There is no -mfma: all of them round alike.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define REFDET_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REFDET_SIMD
#endif
#define REFDET_INLINE inline __attribute__((always_inline))

namespace refdet {

constexpr int64_t kLanes = 16;  // channels in a vector

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// One number, for the channels that fill no vector.
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
  Halves bits;
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
  const Words known = from == from;  // all ones, or 0 for NaN
  const Halves narrow = __builtin_convertvector((rounded & known) | (~known & 0x7fc0), Halves);
  std::memcpy(to, &narrow, sizeof narrow);
}

}  // namespace refdet
