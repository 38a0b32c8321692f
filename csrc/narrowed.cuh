// A draw among the tokens that top-k, top-p and min-p keep, by a block: exact, without sorting the vocabulary.
//
// Those that may be kept are usually few. They lie in tiles whose best token reaches a pivot: the k-th best tile's, which k
// tokens reach at least; or what min_p asks for, where it is alone; or one that is GAP below the best. Only these tiles
// are read, what reaches the pivot is listed in shared memory, and in the list each entry is compared with each. Where the
// list turns out not to hold all that may be kept, or overflows, the whole row is searched (searched.cuh).
#pragma once

#include "logits.cuh"
#include "searched.cuh"

namespace specexit {
namespace {

constexpr int HELD = MAX_VOCABULARY / TILE / NARROWING;  // tiles of a thread
constexpr int LISTED = 2048;  // not measured yet, as NARROWING and GAP
constexpr float GAP = 8.0f;  // at e^-8 of the best token's probability; then, where these do not suffice, at e^-16
constexpr int ATTEMPTS = 2;

struct List {
  uint64_t entries[LISTED];
  // In fixed point; 0 of what top-k drops. What has no weight by itself, 31 below the best, cannot be drawn either: noise
  // lies between -2.82 and 22.88, which the float of logit / temperature keeps apart below 2^28.
  uint64_t weights[LISTED];
  uint16_t tiles[HELD * NARROWING];
  int n_entries, n_tiles;
};

// Lists what reaches the pivot; `n_entries` above LISTED says that there was more.
template <typename T>
__device__ void fill(List& list, const T* logits, int vocabulary, const Draw& draw, const uint64_t (&held)[HELD],
                     unsigned pivot) {
  __syncthreads();
  if (threadIdx.x == 0) list.n_entries = list.n_tiles = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < HELD; i++)
    if (entry_value(held[i]) >= pivot) list.tiles[atomicAdd(&list.n_tiles, 1)] = i * NARROWING + threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.x / WARP; i < list.n_tiles; i += NARROWING / WARP) {
    const int first = list.tiles[i] * TILE + threadIdx.x % WARP * GROUP;
    float x[1][GROUP];
    read_groups(logits, first, TILE, vocabulary, x);
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
      const unsigned key = order_key(draw.scaled(x[0][j]));
      if (key < pivot || first + j >= vocabulary) continue;
      const int place = atomicAdd(&list.n_entries, 1);
      if (place < LISTED) list.entries[place] = entry_key(key, first + j);
    }
  }
  __syncthreads();
}

// The drawn entry of a list that holds all that may be kept.
//
// total  the row's probability, in fixed point, or 0: that of what top-k keeps
__device__ uint64_t draw_listed(List& list, const Draw& draw, float best, uint64_t total, Block<NARROWING>& block) {
  uint64_t mass = 0;
  for (int i = threadIdx.x; i < list.n_entries; i += NARROWING) {
    const unsigned key = entry_value(list.entries[i]);
    int above = 0;
    if (draw.top_k > 0)
      for (int j = 0; j < list.n_entries; j++) above += entry_value(list.entries[j]) > key;
    const bool is_kept = draw.top_k == 0 || above < draw.top_k;  // and those equal to the last
    list.weights[i] = is_kept ? fixed_point(weight_of(from_order_key(key), best)) : 0;
    mass += list.weights[i];
  }
  mass = block.sum(mass);  // whose barrier publishes the weights
  const uint64_t limit = kept_mass(draw, total > 0 ? total : mass);

  uint64_t drawn = 0;
  for (int i = threadIdx.x; i < list.n_entries; i += NARROWING) {
    const uint64_t entry = list.entries[i];
    const float z = from_order_key(entry_value(entry));
    if (list.weights[i] == 0 || weight_of(z, best) < draw.min_p) continue;
    uint64_t before = 0;
    if (draw.top_p < 1.0f)
      for (int j = 0; j < list.n_entries; j++) before += list.entries[j] > entry ? list.weights[j] : 0;
    if (before >= limit) continue;
    const uint64_t score = score_of(entry, draw);
    drawn = score > drawn ? score : drawn;
  }
  return block.max(drawn);
}

// The entry of the drawn token, called by a block of NARROWING threads.
//
// best  the largest scaled logit
// held  the best entries of the row's tiles: the i-th is of tile i NARROWING + threadIdx.x, and 0 past the last tile
// mass  [n_tiles] their probabilities, each relative to its tile's best token; null unless `draw.needs_total()`
template <typename T>
__device__ uint64_t draw_narrowed(const T* logits, int vocabulary, const Draw& draw, float best,
                                  const uint64_t (&held)[HELD], const uint64_t* mass, int n_tiles,
                                  Block<NARROWING>& block) {
  __shared__ List list;
  if (best == -INFINITY) return entry_key(0, 0);  // nothing to draw
  uint64_t total = 0;
  if (mass) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int tile = i * NARROWING + threadIdx.x;
      if (tile >= n_tiles) continue;
      const double weight = weight_of(from_order_key(entry_value(held[i])), best);
      total += static_cast<uint64_t>(weight * static_cast<double>(mass[tile]));
    }
    total = block.sum(total);
  }
  const unsigned k = draw.top_k, highest = order_key(best);
  const bool by_tiles = k > 0 && k <= static_cast<unsigned>(n_tiles);
  const bool by_min_p = k == 0 && !mass;
  // All tokens of at least min_p lie within this, whatever expf rounds; but for those of a denormal one, never drawn.
  float gap = by_min_p ? 0.1f - logf(draw.min_p) : GAP;
  for (int attempt = 0; attempt < ATTEMPTS; attempt++, gap *= 2.0f) {
    unsigned pivot = order_key(best - gap);
    if (by_tiles)
      pivot = key_of_best(order_key(-INFINITY), highest, k, [&](unsigned key) {
        unsigned reaching = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) reaching += entry_value(held[i]) >= key;
        return block.sum(reaching);
      });
    fill(list, logits, vocabulary, draw, held, pivot);
    if (list.n_entries > LISTED) break;
    if (by_tiles || by_min_p || (k > 0 && list.n_entries >= draw.top_k))
      return draw_listed(list, draw, best, total, block);
    if (k > 0) continue;
    uint64_t listed = 0;
    for (int i = threadIdx.x; i < list.n_entries; i += NARROWING)
      listed += fixed_point(weight_of(from_order_key(entry_value(list.entries[i])), best));
    if (block.sum(listed) >= kept_mass(draw, total)) return draw_listed(list, draw, best, total, block);
  }
  return draw_searched(logits, vocabulary, draw, best, block);
}

}  // namespace
}  // namespace specexit
