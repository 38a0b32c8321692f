// Arithmetic that CUDA offers beyond C++. The build forbids the compiler to fuse a multiplication with an addition
// (-ffp-contract=off); nvcc fuses them unless the source says __fmul_rn or __fadd_rn.
#pragma once

#include <math.h>  // fminf, expf, isfinite, INFINITY, ... in the global namespace, as in CUDA

#include <cstdint>
#include <cstring>

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(static_cast<unsigned long long>(bits)) : 64; }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

// PTX cvt.rni.u64.f32: the nearest, of two the even one; saturates, and NaN is 2**63.
inline unsigned long long __float2ull_rn(float x) {
  if (isnan(x)) return 1ull << 63;
  if (x <= 0.0f) return 0;
  if (x >= 18446744073709551616.0f) return ~0ull;
  return static_cast<unsigned long long>(nearbyintf(x));
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// CUDA's min and max take two of one type, or an int and an unsigned, as unsigned. Of a NaN and a number, the number.
#define HOST_RUN_MIN_MAX(type)                                        \
  inline type min(type a, type b) { return b < a ? b : a; }           \
  inline type max(type a, type b) { return a < b ? b : a; }
HOST_RUN_MIN_MAX(int)
HOST_RUN_MIN_MAX(unsigned)
HOST_RUN_MIN_MAX(long)
HOST_RUN_MIN_MAX(unsigned long)
HOST_RUN_MIN_MAX(long long)
HOST_RUN_MIN_MAX(unsigned long long)
#undef HOST_RUN_MIN_MAX
inline unsigned min(int a, unsigned b) { return min(static_cast<unsigned>(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, static_cast<unsigned>(b)); }
inline unsigned max(int a, unsigned b) { return max(static_cast<unsigned>(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, static_cast<unsigned>(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
