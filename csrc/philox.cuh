// Philox4x32-10 and Gumbel noise, as specexit_kernels/philox.py defines them: the same words, to the bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specexit {
namespace {

constexpr int PHILOX_ROUNDS = 10;
constexpr int PHILOX_WORDS = 4;

// The words of tokens 4 `block` to 4 `block` + 3.
__device__ uint4 philox(unsigned block, int position, int64_t seed) {
  unsigned c0 = block, c1 = static_cast<unsigned>(position), c2 = 0, c3 = 0;
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(static_cast<uint64_t>(seed) >> 32);
#pragma unroll
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    const unsigned upper_0 = __umulhi(0xD2511F53u, c0), lower_0 = 0xD2511F53u * c0;
    const unsigned upper_1 = __umulhi(0xCD9E8D57u, c2), lower_1 = 0xCD9E8D57u * c2;
    c0 = upper_1 ^ c1 ^ k0;
    c1 = lower_1;
    c2 = upper_0 ^ c3 ^ k1;
    c3 = lower_0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ float gumbel(unsigned word) {
  const float u = fminf((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  return -logf(-log1pf(-u));
}

// At least the noise, for a fraction of its cost: -log1p(-u) >= u, and u >= 2^-(n + 1) where n bits lead the word as zeros.
__device__ float most_gumbel(unsigned word) { return 0.6932f * static_cast<float>(__clz(word) + 1); }  // ln 2, and a bit

// The noise of one token.
__device__ float gumbel_noise(int64_t seed, int position, unsigned token) {
  const uint4 words = philox(token / PHILOX_WORDS, position, seed);
  const unsigned place = token % PHILOX_WORDS;
  return gumbel(place == 0 ? words.x : place == 1 ? words.y : place == 2 ? words.z : words.w);
}

}  // namespace
}  // namespace specexit
