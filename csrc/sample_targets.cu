// The base's choice in each row of logits, in two launches.
//
//   1. A warp a tile of 1,024 tokens: the tile's best token, by the logit (greedy), by logit / temperature + noise, or, in
//      a row that top-k, top-p or min-p narrow, by logit / temperature alone. The logits are read once.
//   2. A row's best tile is its token. A narrowed row (narrowed.cuh) is read again, out of L2, and draws among what is
//      kept.
//
// A row's tiles and all sums over them are the same in any batch, and so is its token.
#include "sample_targets.h"

#include "launch.h"
#include "logits.cuh"
#include "narrowed.cuh"

namespace specexit {
namespace {

constexpr int WARPS = 8;  // of a block of the first launch, and of the second where no row is narrowed
constexpr int READS = TILE / (EIGHT * WARP);
constexpr unsigned KEY_OF_NAN = 0xffffffffu;  // in a greedy row the largest value, whatever its sign, as to torch.argmax

__device__ __host__ inline int tiles_of(int vocabulary) { return (vocabulary + TILE - 1) / TILE; }

template <typename T>
__global__ void __launch_bounds__(WARPS* WARP) best_of_tiles_kernel(const SampleTargets s) {
  const int tiles = tiles_of(s.vocabulary), lane = threadIdx.x % WARP;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  const int64_t row = index / tiles;
  if (row >= s.rows) return;
  const int tile = index % tiles;
  const T* const logits = static_cast<const T*>(s.logits) + row * s.stride_row;
  const Draw draw = draw_of(s, row);
  const bool has_noise = !draw.is_greedy && draw.keeps_all();

  float x[READS][EIGHT];
#pragma unroll
  for (int i = 0; i < READS; i++)
    read_eight(logits, tile * TILE + (i * WARP + lane) * EIGHT, s.vocabulary, x[i]);
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < READS; i++) {
    const int first = tile * TILE + (i * WARP + lane) * EIGHT;
    if (has_noise) {
#pragma unroll
      for (int j = 0; j < EIGHT; j += PHILOX_WORDS) {
        const uint4 words = philox((first + j) / PHILOX_WORDS, draw.position, draw.seed);
        x[i][j] = draw.scaled(x[i][j]) + gumbel(words.x);
        x[i][j + 1] = draw.scaled(x[i][j + 1]) + gumbel(words.y);
        x[i][j + 2] = draw.scaled(x[i][j + 2]) + gumbel(words.z);
        x[i][j + 3] = draw.scaled(x[i][j + 3]) + gumbel(words.w);
      }
    }
#pragma unroll
    for (int j = 0; j < EIGHT; j++) {
      unsigned key;
      if (draw.is_greedy) key = isnan(x[i][j]) ? KEY_OF_NAN : order_key(x[i][j]);
      else key = order_key(has_noise ? x[i][j] : draw.scaled(x[i][j]));
      const uint64_t entry = entry_key(key, first + j);
      if (first + j < s.vocabulary && entry > best) best = entry;
    }
  }
  best = warp_max(best);
  if (lane == 0) s.best[row * tiles + tile] = best;
}

__global__ void __launch_bounds__(WARPS* WARP) best_of_rows_kernel(const SampleTargets s) {
  const int tiles = tiles_of(s.vocabulary), lane = threadIdx.x % WARP;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= s.rows) return;
  uint64_t best = 0;
  for (int tile = lane; tile < tiles; tile += WARP) {
    const uint64_t entry = s.best[row * tiles + tile];
    best = entry > best ? entry : best;
  }
  best = warp_max(best);
  if (lane == 0) s.targets[row] = entry_index(best);
}

template <typename T>
__global__ void __launch_bounds__(NARROWING, 2) narrowed_rows_kernel(const SampleTargets s) {
  const int tiles = tiles_of(s.vocabulary);
  const int64_t row = blockIdx.x;
  const uint64_t* const entries = s.best + row * tiles;
  const Draw draw = draw_of(s, row);
  Block<NARROWING> block;
  uint64_t best = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += NARROWING) best = entries[tile] > best ? entries[tile] : best;
  best = block.max(best);
  if (!draw.is_greedy && !draw.keeps_all()) {
    const T* const logits = static_cast<const T*>(s.logits) + row * s.stride_row;
    best = draw_narrowed(logits, s.vocabulary, draw, from_order_key(entry_value(best)), entries, tiles, block);
  }
  if (threadIdx.x == 0) s.targets[row] = entry_index(best);
}

template <typename T>
cudaError_t launch_for(const SampleTargets& s, cudaStream_t stream) {
  const int64_t warps = static_cast<int64_t>(s.rows) * tiles_of(s.vocabulary);
  const dim3 blocks(static_cast<unsigned>((warps + WARPS - 1) / WARPS));
  const cudaError_t error = launch(best_of_tiles_kernel<T>, blocks, WARPS * WARP, stream, s);
  if (error != cudaSuccess) return error;
  const bool narrows = s.temperature.data && (s.top_k.data || s.top_p.data || s.min_p.data);
  if (narrows) return launch(narrowed_rows_kernel<T>, s.rows, NARROWING, stream, s);
  return launch(best_of_rows_kernel, (s.rows + WARPS - 1) / WARPS, WARPS * WARP, stream, s);
}

}  // namespace

cudaError_t sample_targets(const SampleTargets& arguments, cudaStream_t stream) {
  switch (arguments.dtype) {
    case Float::FP32: return launch_for<float>(arguments, stream);
    case Float::FP16: return launch_for<__half>(arguments, stream);
    case Float::BF16: return launch_for<__nv_bfloat16>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specexit
