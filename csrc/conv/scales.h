// Scale factors, powers of two, that bring values into the range of float16 (`Half` in gemm.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simd.h"

namespace refdet {

// The largest magnitude of bfloat16 values in each lane, as bit patterns, which sort like the nonnegative values that they
// encode.
struct MaxMagnitude {
  UInt16s bits{};

  // `count` is a multiple of kLanes.
  REFDET_INLINE void update(const c10::BFloat16* values, int64_t count) {
    for (int64_t c = 0; c < count; c += kLanes) {
      UInt16s other;
      std::memcpy(&other, values + c, sizeof other);
      other &= 0x7fff;
      bits = other > bits ? other : bits;
    }
  }
};

// The power of two that scales the largest magnitude into [bound / 2, bound], where `bound` is a power of two. 1 if the
// magnitude is not finite, so that its results are not finite either; at most 2^100, for magnitudes near 0.
REFDET_INLINE float scale_to(float bound, const MaxMagnitude& magnitude) {
  int bits = 0, bound_bits;
  for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, static_cast<int>(magnitude.bits[lane]));
  std::memcpy(&bound_bits, &bound, sizeof bound_bits);
  const int exponent = bits >> 7;  // the magnitude is less than 2^(exponent - 126)
  if (exponent == 255) return 1;
  const int scale_bits = std::clamp((bound_bits >> 23) - (exponent - 126), 1, 227) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return scale;
}

}  // namespace refdet
