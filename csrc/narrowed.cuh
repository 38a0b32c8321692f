// A draw among the tokens that top-k, top-p and min-p keep, by a block: exact, without sorting the vocabulary.
//
// What is kept are the tokens whose key (the order of logit / temperature) reaches a threshold; at the threshold itself
// top-p may keep those of the lowest ids only. Thresholds are found bit by bit (highest_key), each bit by a sum over the
// tokens. Usually these are a few that a first pass over the row has listed in shared memory: all within GAP of the best,
// or, with top-k, all that reach the k-th best tile, of which there are k at least. Where the list turns out not to hold
// all that may be kept, or overflows, the row itself is read for every bit: slow, and as exact.
//
// Probabilities are added up in fixed point. Such sums do not depend on their order, so a row's token does not depend on
// how its tokens are spread over threads.
#pragma once

#include "logits.cuh"

namespace specexit {
namespace {

constexpr int NARROWING = 512;  // threads
constexpr int LISTED = 2048;    // tokens that the list holds
constexpr float GAP = 8.0f;     // of what is listed to the best: at e^-8 of its probability

// A probability relative to the best token's, in units of 2^-44: the sum of 2^18 fits in 64 bits.
__device__ float weight_of(float z, float best) { return expf(z - best); }
__device__ uint64_t fixed_point(float weight) { return __float2ull_rn(weight * 0x1p44f); }

// The tokens that are searched: those of the list, as entries, or those of the row. Sums are the whole block's.
template <typename T>
struct Tokens {
  const T* logits;
  int vocabulary;
  const Draw& draw;
  float best;  // scaled logit
  const uint64_t* list;
  int listed;  // -1: the row
  Block<NARROWING>& block;

  // Calls visit(entry) for every token, each in one thread.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    if (listed >= 0) {
      for (int i = threadIdx.x; i < listed; i += NARROWING) visit(list[i]);
      return;
    }
    for (int first = threadIdx.x * EIGHT; first < vocabulary; first += NARROWING * EIGHT) {
      float x[EIGHT];
      read_eight(logits, first, vocabulary, x);
#pragma unroll
      for (int i = 0; i < EIGHT; i++)
        if (first + i < vocabulary) visit(entry_key(order_key(draw.scaled(x[i])), first + i));
    }
  }

  // How many lie from one entry to another.
  __device__ __forceinline__ unsigned count(uint64_t from, uint64_t to) const {
    unsigned found = 0;
    each([&](uint64_t entry) { found += entry >= from && entry <= to; });
    return block.sum(found);
  }

  // The probability of those that reach a key.
  __device__ __forceinline__ uint64_t mass(unsigned key) const {
    uint64_t found = 0;
    each([&](uint64_t entry) {
      const unsigned at = entry_value(entry);
      if (at >= key) found += fixed_point(weight_of(from_order_key(at), best));
    });
    return block.sum(found);
  }

  // How much of a total is kept by top-p: a token is while those before it have less; the best one always.
  __device__ uint64_t kept_mass(uint64_t total) const {
    const double limit = ceil(static_cast<double>(draw.top_p) * static_cast<double>(total));
    return limit > 1.0 ? static_cast<uint64_t>(limit) : uint64_t(1);
  }
};

// The entry of the drawn token, called by a block of NARROWING threads.
//
// best   the largest scaled logit
// tiles  the best entries of the row's tiles, [n_tiles]
template <typename T>
__device__ uint64_t draw_narrowed(const T* logits, int vocabulary, const Draw& draw, float best, const uint64_t* tiles,
                                  int n_tiles, Block<NARROWING>& block) {
  __shared__ uint64_t list[LISTED];
  __shared__ int listed;
  if (best == -INFINITY) return entry_key(0, 0);  // nothing to draw
  Tokens<T> tokens = {logits, vocabulary, draw, best, list, -1, block};

  // List what reaches the pivot. The k-th best tile's key is reached by k tokens at least.
  const unsigned highest = order_key(best), lowest = order_key(-INFINITY);
  const unsigned k = draw.top_k;
  unsigned pivot = order_key(best - GAP);
  if (k > 0)
    pivot = key_of_best(lowest, highest, k, [&](unsigned key) {
      unsigned reaching = 0;
      for (int i = threadIdx.x; i < n_tiles; i += NARROWING) reaching += entry_value(tiles[i]) >= key;
      return block.sum(reaching);
    });
  if (threadIdx.x == 0) listed = 0;
  __syncthreads();
  const bool by_mass = k == 0 && draw.top_p < 1.0f;
  uint64_t mass = 0;
  tokens.each([&](uint64_t entry) {
    const unsigned key = entry_value(entry);
    if (by_mass) mass += fixed_point(weight_of(from_order_key(key), best));
    if (key < pivot) return;
    const int place = atomicAdd(&listed, 1);
    if (place < LISTED) list[place] = entry;
  });
  if (by_mass) mass = block.sum(mass);
  __syncthreads();
  if (listed <= LISTED) {
    tokens.listed = listed;
    bool has_all = true;
    if (by_mass) has_all = tokens.mass(pivot) >= tokens.kept_mass(mass);
    else if (k == 0) has_all = draw.min_p >= 2.0f * expf(-GAP);
    if (!has_all) tokens.listed = -1;
  }

  unsigned least = tokens.listed >= 0 ? pivot : lowest;  // the key that a kept token reaches
  if (k > 0)
    least = key_of_best(least, highest, k, [&](unsigned key) { return tokens.count(value_key(key), ~uint64_t(0)); });
  uint64_t threshold = value_key(least);  // the entry that it reaches
  if (draw.top_p < 1.0f) {
    const uint64_t limit = tokens.kept_mass(by_mass ? mass : tokens.mass(least));
    least = highest_key(least, highest, limit, [&](unsigned key) { return tokens.mass(key); });
    const uint64_t each = fixed_point(weight_of(from_order_key(least), best));
    const uint64_t kept = (limit - tokens.mass(least + 1) + each - 1) / each;  // of the tokens at `least`
    const uint64_t first = entry_key(least, vocabulary - 1), last = entry_key(least, 0);
    threshold = first;
    if (kept < tokens.count(first, last))
      threshold = key_of_best(first, last, kept, [&](uint64_t entry) { return tokens.count(entry, last); });
  }

  const float least_weight = draw.min_p > 1.0f ? 1.0f : draw.min_p;
  uint64_t drawn = 0;
  tokens.each([&](uint64_t entry) {
    if (entry < threshold) return;
    const float z = from_order_key(entry_value(entry));
    if (weight_of(z, best) < least_weight) return;
    const unsigned token = entry_index(entry);
    const uint64_t score = entry_key(order_key(z + draw.noise(token)), token);
    drawn = score > drawn ? score : drawn;
  });
  return block.max(drawn);
}

}  // namespace
}  // namespace specexit
