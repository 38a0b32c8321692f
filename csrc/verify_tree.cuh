// The longest path of a tree that the base itself would have taken, by one warp.
//
// A node matches if its token is its parent's target. It stands if it and all its ancestors match: if none of its visible
// bits is unmatched. Ballots make the matched bits of all nodes; no pointer is chased.
#pragma once

#include "reduce.cuh"
#include "tensor.h"
#include "tree.h"

namespace specexit {
namespace {

// The accepted path: the visible bits of its last node.
struct Path {
  uint64_t nodes[MAX_WORDS];
  int length;  // the root included, at most as many as there are columns

  // Where a node stands on the path; -1 if it does not.
  __device__ int index(int node) const {
    int before = 0;
    uint64_t found = 0;
#pragma unroll
    for (int w = 0; w < MAX_WORDS; w++) {
      const int place = node - w * WORD;
      const uint64_t bit = place >= 0 && place < WORD ? uint64_t(1) << place : 0;
      found |= nodes[w] & bit;
      before += __popcll(nodes[w] & (place >= WORD ? ~uint64_t(0) : bit - (bit != 0)));
    }
    return found != 0 && before < length ? before : -1;
  }
};

// The visible word of a node without the bits past the last node, which mean nothing.
__device__ uint64_t visible_word(const Matrix<const int64_t>& visible, int node, int word, int nodes) {
  const int left = nodes - word * WORD;
  if (left <= 0) return 0;
  const uint64_t bits = static_cast<uint64_t>(visible[node][word]);
  return left < WORD ? bits & ((uint64_t(1) << left) - 1) : bits;
}

// Called by a whole warp; every lane gets the path. `target(node)` is the base's choice after a node.
template <typename Target>
__device__ Path longest_path(const Vector<const int32_t>& tokens, const Vector<const int32_t>& parent,
                             const Matrix<const int64_t>& visible, int nodes, int columns, Target target) {
  // A node's token, parent and target are loaded for all chunks of lanes before the first ballot, across which the
  // compiler moves no load.
  constexpr int CHUNKS = MAX_NODES / WARP;
  const int lane = threadIdx.x % WARP;
  int token[CHUNKS], above[CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    const int n = chunk * WARP + lane;
    token[chunk] = n < nodes ? tokens[n] : 0;
    above[chunk] = n < nodes ? max(0, min(parent[n], n - 1)) : 0;
  }
  bool matches[CHUNKS];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    matches[chunk] = chunk * WARP + lane < nodes && token[chunk] == target(above[chunk]);
  uint64_t matched[MAX_WORDS] = {1};  // the root
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    matched[chunk / 2] |= static_cast<uint64_t>(__ballot_sync(ALL_LANES, matches[chunk])) << chunk % 2 * WARP;

  // Of several deepest nodes the lowest one; the root, at depth 0, if none else stands. An inert node sees nothing.
  unsigned deepest = MAX_NODES - 1;
  for (int n = lane; n < nodes; n += WARP) {
    uint64_t unmatched = 0;
    int depth = 0;
#pragma unroll
    for (int w = 0; w < MAX_WORDS; w++) {
      const uint64_t seen = visible_word(visible, n, w, nodes);
      unmatched |= seen & ~matched[w];
      depth += __popcll(w == 0 ? seen & ~uint64_t(1) : seen);
    }
    if (unmatched == 0) deepest = max(deepest, unsigned(depth * MAX_NODES + MAX_NODES - 1 - n));
  }
  deepest = __reduce_max_sync(ALL_LANES, deepest);

  Path path = {};
#pragma unroll
  for (int w = 0; w < MAX_WORDS; w++) {
    path.nodes[w] = visible_word(visible, MAX_NODES - 1 - deepest % MAX_NODES, w, nodes);
    path.length += __popcll(path.nodes[w]);
  }
  path.length = min(path.length, columns);
  return path;
}

}  // namespace
}  // namespace specexit
