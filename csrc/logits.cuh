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

constexpr int GROUP = 8;  // tokens that a lane reads at once: 16 bytes of 16-bit floats
constexpr float LARGEST = 0x1.fffffep127f;  // finite, of fp32

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// N times a group of a lane, from token `first` on in steps of `step`, both multiples of GROUP; -inf past the vocabulary.
// All loads are issued before the first is waited for.
template <int N, typename T>
__device__ __forceinline__ void read_groups(const T* logits, int first, int step, int vocabulary, float (&x)[N][GROUP]) {
  constexpr int LOADS = GROUP * sizeof(T) / sizeof(uint4);
  if (first + (N - 1) * step + GROUP <= vocabulary && reinterpret_cast<uintptr_t>(logits) % sizeof(uint4) == 0) {
    uint4 loads[N][LOADS];
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
      for (int j = 0; j < LOADS; j++)
        loads[i][j] = __ldg(reinterpret_cast<const uint4*>(logits + first + i * step) + j);
#pragma unroll
    for (int i = 0; i < N; i++) {
      T values[GROUP];
      memcpy(values, loads[i], sizeof(values));
#pragma unroll
      for (int j = 0; j < GROUP; j++) x[i][j] = to_float(values[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
      const int token = first + i * step + j;
      x[i][j] = token < vocabulary ? to_float(logits[token]) : -INFINITY;
    }
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

  // Whether top-k, top-p or min-p narrow what is drawn from.
  __device__ bool is_narrowed() const { return !is_greedy && (top_k > 0 || top_p < 1.0f || min_p > 0.0f); }

  // Whether the probability of the whole row is asked for.
  __device__ bool needs_total() const { return !is_greedy && top_k == 0 && top_p < 1.0f; }

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
  if (draw.min_p > 1.0f) draw.min_p = 1.0f;
  draw.position = s.positions[row];
  draw.seed = s.seeds[row];
  return draw;
}

// The probability of a scaled logit relative to the best one's, and that in fixed point, in units of 2^-44: so that sums,
// of up to 2^19 of them, depend on no order.
__device__ float weight_of(float z, float best) { return expf(z - best); }
__device__ uint64_t fixed_point(float weight) { return __float2ull_rn(weight * 0x1p44f); }

}  // namespace
}  // namespace specexit
