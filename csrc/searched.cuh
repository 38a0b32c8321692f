// A draw among the tokens that top-k, top-p and min-p keep, by passes of a block over the whole row: for rows of which so many
// tokens may be kept that they fit in no list.
//
// What is kept are the tokens whose key (the order of logit / temperature) reaches a threshold; at the threshold itself
// top-p may keep those of the lowest ids only. Thresholds are found by bisection, each step a sum over the row.
#pragma once

#include "logits.cuh"

namespace specexit {
namespace {

constexpr int NARROWING = 256;  // threads of a block that draws in a narrowed row

// How much of a total is kept by top-p: a token is while those before it have less; the best one always.
__device__ uint64_t kept_mass(const Draw& draw, uint64_t total) {
  if (draw.top_p >= 1.0f) return ~uint64_t(0);
  const double limit = ceil(static_cast<double>(draw.top_p) * static_cast<double>(total));
  return limit > 1.0 ? static_cast<uint64_t>(limit) : uint64_t(1);
}

// The entry of a token's score, which the largest one wins.
__device__ uint64_t score_of(uint64_t entry, const Draw& draw) {
  const unsigned token = entry_index(entry);
  return entry_key(order_key(from_order_key(entry_value(entry)) + draw.noise(token)), token);
}

// A row of logits; sums over it are the whole block's.
template <typename T>
struct Row {
  const T* logits;
  int vocabulary;
  const Draw& draw;
  float best;  // scaled logit
  Block<NARROWING>& block;

  // Calls visit(entry) for every token, each in one thread.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int first = threadIdx.x * GROUP; first < vocabulary; first += NARROWING * GROUP) {
      float x[1][GROUP];
      read_groups(logits, first, 0, vocabulary, x);
#pragma unroll
      for (int j = 0; j < GROUP; j++)
        if (first + j < vocabulary) visit(entry_key(order_key(draw.scaled(x[0][j])), first + j));
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
};

// The drawn entry, called by a block of NARROWING threads; `best` is the largest scaled logit.
template <typename T>
__device__ uint64_t draw_searched(const T* logits, int vocabulary, const Draw& draw, float best,
                                  Block<NARROWING>& block) {
  const Row<T> row = {logits, vocabulary, draw, best, block};
  const unsigned highest = order_key(best), k = draw.top_k;
  unsigned least = order_key(-INFINITY);  // the key that a kept token reaches
  if (k > 0)
    least = key_of_best(least, highest, k, [&](unsigned key) { return row.count(value_key(key), ~uint64_t(0)); });
  uint64_t threshold = value_key(least);  // the entry that it reaches
  if (draw.top_p < 1.0f) {
    const uint64_t limit = kept_mass(draw, row.mass(least));
    least = highest_key(least, highest, limit, [&](unsigned key) { return row.mass(key); });
    // As `least` is the highest key whose mass is the limit or more, some token is there, and its share is not 0.
    const uint64_t share = fixed_point(weight_of(from_order_key(least), best));
    const uint64_t kept = (limit - row.mass(least + 1) + share - 1) / share;  // of the tokens at `least`
    const uint64_t first = entry_key(least, vocabulary - 1), last = entry_key(least, 0);
    threshold = first;
    if (kept < row.count(first, last))
      threshold = key_of_best(first, last, kept, [&](uint64_t entry) { return row.count(entry, last); });
  }
  uint64_t drawn = 0;
  row.each([&](uint64_t entry) {
    if (entry < threshold || weight_of(from_order_key(entry_value(entry)), best) < draw.min_p) return;
    const uint64_t score = score_of(entry, draw);
    drawn = score > drawn ? score : drawn;
  });
  return block.max(drawn);
}

}  // namespace
}  // namespace specexit
