// The base's choice in each row of logits, in two launches.
//
//   1. A warp four tiles of 256 tokens: the best token of each, by the logit (greedy) or, in a row that top-k, top-p or min-p
//      narrow, by logit / temperature; or the best one of the four by logit / temperature + noise. The logits are read from
//      memory once.
//   2. A row's best tile has its token. In a narrowed row (narrowed.cuh) the tiles that may hold what is kept are read
//      again.
//
// A row's tiles and all sums over them are the same in any batch, and so is its token.
#include "sample_targets.h"

#include "launch.h"
#include "logits.cuh"
#include "narrowed.cuh"

namespace specexit {
namespace {

constexpr int WARPS = 8;  // of a block of the first launch, and of the second where no row is narrowed; not measured yet
constexpr int TILES = 4;  // of a warp, a group a lane of each
static_assert(TILE == GROUP * WARP, "a lane reads a group of every tile");
constexpr unsigned KEY_OF_NAN = 0xffffffffu;  // in a greedy row the largest value, whatever its sign, as to torch.argmax

int tiles_of(int vocabulary) { return (vocabulary + TILE - 1) / TILE; }

// The best entry of a tile, for the whole warp; the lane has the tokens from `first` on.
__device__ uint64_t best_of_tile(const float (&x)[GROUP], int first) {
  float best = -INFINITY;
  bool has_nan = false;
#pragma unroll
  for (int j = 0; j < GROUP; j++) {
    best = fmaxf(best, x[j]);  // passes over NaN
    has_nan |= isnan(x[j]);
  }
  const unsigned key = has_nan ? KEY_OF_NAN : order_key(best), top = __reduce_max_sync(ALL_LANES, key);
  unsigned token = ~0u;
  if (key == top) {
#pragma unroll
    for (int j = GROUP - 1; j >= 0; j--)
      if (x[j] == best) token = first + j;
    if (has_nan) {
#pragma unroll
      for (int j = GROUP - 1; j >= 0; j--)
        if (isnan(x[j])) token = first + j;
    }
  }
  return entry_key(top, __reduce_min_sync(ALL_LANES, token));
}

// The best entry of a warp's tiles by scaled logit + noise; the lane has the tokens from `first` on in every tile. All that
// their words allow is added to the logits first. Of each lane's best by that the noise is computed, and then that of the
// few tokens that could still do better. Their logits are read again, as registers have no index.
template <typename T>
__device__ uint64_t best_with_noise(const T* logits, int vocabulary, const Draw& draw, float (&z)[TILES][GROUP],
                                    int first) {
  float most = -INFINITY;
  int most_at = 0;  // n of the n % GROUP-th token in tile n / GROUP
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < GROUP; j += PHILOX_WORDS) {
      const uint4 words = philox((first + i * TILE + j) / PHILOX_WORDS, draw.position, draw.seed);
      const unsigned of_token[PHILOX_WORDS] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int w = 0; w < PHILOX_WORDS; w++) {
        z[i][j + w] += most_gumbel(of_token[w]);
        if (z[i][j + w] > most) most = z[i][j + w], most_at = i * GROUP + j + w;
      }
    }
  const auto entry_of = [&](int n) {
    const int token = first + n / GROUP * TILE + n % GROUP;
    if (token >= vocabulary) return uint64_t(0);
    return entry_key(order_key(draw.scaled(to_float(logits[token])) + draw.noise(token)), token);
  };
  uint64_t best = entry_of(most_at);
  const float reached = from_order_key(__reduce_max_sync(ALL_LANES, entry_value(best)));

  unsigned able = 0;  // bit n
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < GROUP; j++) able |= unsigned(z[i][j] >= reached) << (i * GROUP + j);
  for (able &= ~(1u << most_at); able; able &= able - 1) {
    const uint64_t entry = entry_of(__ffs(able) - 1);
    best = entry > best ? entry : best;
  }
  return warp_max(best);
}

// The probability of a tile's tokens, relative to its best one's.
__device__ uint64_t mass_of_tile(const float (&z)[GROUP], float best) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < GROUP; j++) sum += weight_of(z[j], best);
  return warp_sum(best > -INFINITY ? fixed_point(sum) : uint64_t(0));
}

// DRAWS: some row may not be greedy. Noise takes registers, of which reading alone needs few.
template <typename T, bool DRAWS>
__global__ void __launch_bounds__(WARPS* WARP, DRAWS ? 2 : 4) best_of_tiles_kernel(const SampleTargets s, int tiles) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = blockIdx.x;
  const int tile = (blockIdx.y * WARPS + threadIdx.x / WARP) * TILES;
  if (tile >= tiles) return;
  const int first = tile * TILE + lane * GROUP;
  const T* const logits = static_cast<const T*>(s.logits) + row * s.stride_row;
  const Draw draw = DRAWS ? draw_of(s, row) : Draw{true};
  float x[TILES][GROUP];
  read_groups(logits, first, TILE, s.vocabulary, x);
  uint64_t best = 0, mass = 0;  // lane i keeps those of tile i
  if (!draw.is_greedy) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < GROUP; j++) x[i][j] = draw.scaled(x[i][j]);
    if (!draw.is_narrowed()) {
      best = best_with_noise(logits, s.vocabulary, draw, x, first);
      if (lane < TILES && tile + lane < tiles) s.best[row * tiles + tile + lane] = lane == 0 ? best : 0;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const uint64_t entry = best_of_tile(x[i], first + i * TILE);
    if (lane == i) best = entry;
    if (draw.needs_total()) {
      const uint64_t sum = mass_of_tile(x[i], from_order_key(entry_value(entry)));
      if (lane == i) mass = sum;
    }
  }
  if (lane < TILES && tile + lane < tiles) {
    s.best[row * tiles + tile + lane] = best;
    if (draw.needs_total()) s.mass[row * tiles + tile + lane] = mass;
  }
}

__global__ void __launch_bounds__(WARPS* WARP) best_of_rows_kernel(const SampleTargets s, int tiles) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (row >= s.rows) return;
  uint64_t best = 0;
#pragma unroll 4
  for (int tile = lane; tile < tiles; tile += WARP) {
    const uint64_t entry = s.best[row * tiles + tile];
    best = entry > best ? entry : best;
  }
  best = warp_max(best);
  if (lane == 0) s.targets[row] = entry_index(best);
}

template <typename T>
__global__ void __launch_bounds__(NARROWING, 1) narrowed_rows_kernel(const SampleTargets s, int tiles) {
  const int64_t row = blockIdx.x;
  const Draw draw = draw_of(s, row);
  Block<NARROWING> block;
  uint64_t held[HELD], best = 0;  // the thread's tiles
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int tile = i * NARROWING + threadIdx.x;
    held[i] = tile < tiles ? s.best[row * tiles + tile] : 0;
    best = held[i] > best ? held[i] : best;
  }
  best = block.max(best);
  if (draw.is_narrowed()) {
    const T* const logits = static_cast<const T*>(s.logits) + row * s.stride_row;
    const uint64_t* const mass = draw.needs_total() ? s.mass + row * tiles : nullptr;
    best = draw_narrowed(logits, s.vocabulary, draw, from_order_key(entry_value(best)), held, mass, tiles, block);
  }
  if (threadIdx.x == 0) s.targets[row] = entry_index(best);
}

template <typename T>
cudaError_t launch_for(const SampleTargets& s, cudaStream_t stream) {
  const int tiles = tiles_of(s.vocabulary), warps = (tiles + TILES - 1) / TILES;
  const dim3 blocks(s.rows, (warps + WARPS - 1) / WARPS);
  const auto best_of_tiles = s.temperature.data ? best_of_tiles_kernel<T, true> : best_of_tiles_kernel<T, false>;
  const cudaError_t error = launch(best_of_tiles, blocks, WARPS * WARP, stream, s, tiles);
  if (error != cudaSuccess) return error;
  const bool narrows = s.temperature.data && (s.top_k.data || s.top_p.data || s.min_p.data);
  if (narrows) return launch(narrowed_rows_kernel<T>, s.rows, NARROWING, stream, s, tiles);
  return launch(best_of_rows_kernel, (s.rows + WARPS - 1) / WARPS, WARPS * WARP, stream, s, tiles);
}

}  // namespace

cudaError_t sample_targets(const SampleTargets& arguments, cudaStream_t stream) {
  if (arguments.vocabulary < 1 || arguments.vocabulary > MAX_VOCABULARY) return cudaErrorInvalidValue;
  switch (arguments.dtype) {
    case Float::FP32: return launch_for<float>(arguments, stream);
    case Float::FP16: return launch_for<__half>(arguments, stream);
    case Float::BF16: return launch_for<__nv_bfloat16>(arguments, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace specexit
