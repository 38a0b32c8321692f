// A row of logits and how its token is chosen.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "philox.cuh"
#include "reduce.cuh"
#include "sample_targets.h"

namespace specexit {
namespace {

constexpr int EIGHT = 8;  // tokens that a lane reads at once: 16 bytes of 16-bit floats
constexpr float LARGEST = 0x1.fffffep127f;  // finite, of fp32

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Eight logits from token `first` on, a multiple of eight; -inf past the vocabulary.
template <typename T>
__device__ void read_eight(const T* logits, int first, int vocabulary, float (&x)[EIGHT]) {
  constexpr int LOADS = EIGHT * sizeof(T) / sizeof(uint4);
  if (first + EIGHT <= vocabulary && reinterpret_cast<uintptr_t>(logits) % sizeof(uint4) == 0) {
    uint4 loads[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) loads[i] = __ldg(reinterpret_cast<const uint4*>(logits + first) + i);
    T values[EIGHT];
    memcpy(values, loads, sizeof(values));
#pragma unroll
    for (int i = 0; i < EIGHT; i++) x[i] = to_float(values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < EIGHT; i++) x[i] = first + i < vocabulary ? to_float(logits[first + i]) : -INFINITY;
}

// The settings of a row.
struct Draw {
  bool is_greedy;
  float temperature;
  int top_k;    // 0: off
  float top_p;  // 1 or above: off
  float min_p;  // 0 or below, or NaN: off
  int position;
  int64_t seed;

  __device__ bool keeps_all() const { return top_k == 0 && top_p >= 1.0f && !(min_p > 0.0f); }

  // logits / temperature; NaN is -inf, and infinity the largest finite number.
  __device__ float scaled(float logit) const {
    const float z = __fdiv_rn(logit, temperature);
    return z > -INFINITY ? fminf(z, LARGEST) : -INFINITY;
  }

  __device__ float noise(unsigned token) const { return gumbel_noise(seed, position, token); }
};

__device__ Draw draw_of(const SampleTargets& s, int64_t row) {
  Draw draw = {};
  draw.temperature = s.temperature.data ? s.temperature[row] : 0.0f;
  draw.is_greedy = !(draw.temperature > 0.0f);  // NaN too
  const int k = s.top_k.data ? s.top_k[row] : 0;
  draw.top_k = k > 0 && k < s.vocabulary ? k : 0;
  const float p = s.top_p.data ? s.top_p[row] : 1.0f;
  draw.top_p = p < 1.0f ? p : 1.0f;  // NaN is off
  draw.min_p = s.min_p.data ? s.min_p[row] : 0.0f;
  draw.position = s.positions[row];
  draw.seed = s.seeds[row];
  return draw;
}

}  // namespace
}  // namespace specexit
