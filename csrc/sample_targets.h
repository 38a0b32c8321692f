// The op sample_targets: specexit_kernels/sample_targets.py says what it means.
#pragma once

#include "tensor.h"

namespace specexit {

constexpr int TILE = 1024;  // tokens whose best one the first launch finds

enum class Float : int { FP32 = 0, FP16 = 1, BF16 = 2 };

struct SampleTargets {
  const void* logits;  // [N, V], the last axis dense
  int64_t stride_row;
  Float dtype;
  Vector<const int32_t> positions;  // [N]
  Vector<const int64_t> seeds;      // [N]
  Vector<const float> temperature;  // [N]; no data: every row is greedy
  Vector<const int32_t> top_k;      // [N]; no data: off, as the next two
  Vector<const float> top_p;        // [N]
  Vector<const float> min_p;        // [N]
  int rows, vocabulary;             // N, V
  uint64_t* best;    // [N, tiles], scratch
  int32_t* targets;  // [N], out
};

// Two launches. `best` must hold N times ceil(V / TILE) entries.
cudaError_t sample_targets(const SampleTargets& arguments, cudaStream_t stream);

}  // namespace specexit
