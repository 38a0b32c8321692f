// Stands in for the CUDA toolkit's header in a host run: IEEE half precision, stored as its bits.
#pragma once

#include <cuda_runtime.h>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
} __attribute__((aligned(4)));
using half = __half;

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16;
  const unsigned exponent = x.bits >> 10 & 31;
  const unsigned fraction = x.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {  // zero and subnormal: a multiple of 2**-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// To the nearest, of two the even one; every NaN becomes CUDA's.
inline __half __float2half_rn(float x) {
  if (isnan(x)) return {0x7fff};
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
  const unsigned magnitude = __float_as_uint(x) & 0x7fffffffu;
  unsigned bits;
  if (magnitude >= 0x477ff000u) {  // 65520 and above
    bits = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2**-14: the sum's last bit is worth 2**-24, so it rounds as wanted
    bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | bits)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
