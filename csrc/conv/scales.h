// Powers of two that bring numbers to where float16 holds them well, see `Half` in gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace refdet {

// The largest magnitude of many bfloat16 numbers, as bits, which are ordered as the magnitudes are.
struct Largest {
  Halves bits{};

  REFDET_INLINE void take(const c10::BFloat16* numbers, int64_t count) {
    for (int64_t c = 0; c < count; c += kLanes) {
      Halves other;
      std::memcpy(&other, numbers + c, sizeof other);
      other &= 0x7fff;
      bits = other > bits ? other : bits;
    }
  }
};

// The power of two that makes a number at most `bound`, also a power of two, and at least half of it. 1 where a
// number is not finite, whose results then are not finite either; 2^100 is the largest, for 0 and what is close to it.
REFDET_INLINE float scale_to(float bound, const Largest& largest) {
  int bits = 0, bound_bits;
  for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, static_cast<int>(largest.bits[lane]));
  std::memcpy(&bound_bits, &bound, sizeof bound_bits);
  const int exponent = bits >> 7;  // the number is less than 2^(exponent - 126)
  if (exponent == 255) return 1;
  const int wanted = std::clamp((bound_bits >> 23) - (exponent - 126), 1, 227) << 23;
  float scale;
  std::memcpy(&scale, &wanted, sizeof scale);
  return scale;
}

}  // namespace refdet
