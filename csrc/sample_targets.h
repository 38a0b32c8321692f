// The op sample_targets: specexit_kernels/sample_targets.py says what it means.
#pragma once

#include "tensor.h"

namespace specexit {

constexpr int TILE = 256;                    // tokens whose best one the first launch finds
constexpr int MAX_VOCABULARY = 2048 * TILE;  // what the second launch holds the tiles of

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
  int rows, vocabulary;             // N, V up to MAX_VOCABULARY
  uint64_t* best;    // [N, tiles], scratch; tiles = ceil(V / TILE); 0 where the entry of a tile before it is better
  uint64_t* mass;    // [N, tiles], scratch; only with top_p
  int32_t* targets;  // [N], out
};

// Two launches.
cudaError_t sample_targets(const SampleTargets& arguments, cudaStream_t stream);

}  // namespace specexit
