// What the kernels share: order-preserving keys of floats, sums and maxima over a warp and a block, and selection.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specexit {
namespace {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// An unsigned that orders as the float does. -0 and 0 are equal; NaN, if it is positive, lies above infinity.
__device__ unsigned order_key(float value) {
  const unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// The float of a key.
__device__ float from_order_key(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// An entry of a value's key and an index; entries order by the value, then by the lower index.
__device__ uint64_t entry_key(unsigned key, unsigned index) {
  return static_cast<uint64_t>(key) << 32 | static_cast<unsigned>(~index);
}

__device__ uint64_t value_key(unsigned key) { return static_cast<uint64_t>(key) << 32; }  // the least of this value
__device__ unsigned entry_value(uint64_t entry) { return static_cast<unsigned>(entry >> 32); }
__device__ unsigned entry_index(uint64_t entry) { return ~static_cast<unsigned>(entry); }

__device__ unsigned warp_sum(unsigned value) { return __reduce_add_sync(ALL_LANES, value); }

__device__ uint64_t warp_sum(uint64_t value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(ALL_LANES, static_cast<unsigned long long>(value), distance);
  return value;
}

__device__ uint64_t warp_max(uint64_t value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(ALL_LANES, static_cast<unsigned long long>(value), distance);
    value = value > other ? value : other;
  }
  return value;
}

// A block's sums and maxima, for every thread. Successive calls take turns in two halves of the shared memory, so that
// one barrier each is enough: whoever writes a half has passed the barrier after everybody's last read of it.
template <int THREADS>
class Block {
 public:
  // Of unsigned or uint64_t.
  template <typename T>
  __device__ T sum(T value) {
    uint64_t* const part = gather(warp_sum(value));
    T total = 0;
    for (int warp = 0; warp < WARPS; warp++) total += static_cast<T>(part[warp]);
    return total;
  }

  __device__ uint64_t max(uint64_t value) {
    uint64_t* const part = gather(warp_max(value));
    uint64_t best = 0;
    for (int warp = 0; warp < WARPS; warp++) best = part[warp] > best ? part[warp] : best;
    return best;
  }

 private:
  static constexpr int WARPS = THREADS / WARP;

  __device__ uint64_t* gather(uint64_t of_warp) {
    __shared__ uint64_t parts[2][WARPS];
    turn ^= 1;
    if (threadIdx.x % WARP == 0) parts[turn][threadIdx.x / WARP] = of_warp;
    __syncthreads();
    return parts[turn];
  }

  int turn = 0;
};

// The largest key from `low` to `high` at which `measure`, a sum over everything that reaches the key, is `wanted` or more;
// or `low`. Selection without sorting, exact, in as many sums as the range has bits.
template <typename Key, typename Amount, typename Measure>
__device__ Key highest_key(Key low, Key high, Amount wanted, Measure measure) {
  while (low < high) {
    const Key middle = high - (high - low) / 2;  // above low; no range overflows
    if (measure(middle) >= wanted) low = middle;
    else high = middle - 1;
  }
  return low;
}

// A key that the n largest entries reach and, but for others equal to the last of these, no other. Between the n-th and
// the next any key does, so few of the bits are asked for.
template <typename Key, typename Count>
__device__ Key key_of_best(Key low, Key high, unsigned n, Count count) {
  while (low < high) {
    const Key middle = high - (high - low) / 2;  // above low; no range overflows
    const unsigned found = count(middle);
    if (found == n) return middle;
    if (found > n) low = middle;
    else high = middle - 1;
  }
  return low;
}

}  // namespace
}  // namespace specexit
