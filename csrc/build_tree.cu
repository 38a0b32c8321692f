// The best candidates of a draft as a token tree, a block a sequence.
//
// The nodes - 1 best candidates are those whose 64-bit keys, the score's order and then the lower index, reach the key of
// the last one; keys differ, so exactly so many do, whatever ties. They stay in the order of candidates, so a candidate's
// node is one more than the number chosen before it, which a bitmap of the chosen ones counts.
//
// No node can lose its parent. Scores are monotone, a candidate's being min(its own, its parent's) (grow_beam), and a
// parent has the lower index: its key is the greater, also where the scores tie because rounding took a log-probability
// to 0 or above. So whoever is chosen has its parent chosen before it. With other scores a node hangs from the last node
// chosen up to the parent's index, which still makes a tree.
#include "build_tree.h"

#include "launch.h"
#include "reduce.cuh"

namespace specexit {
namespace {

constexpr int ITEMS = 4;  // candidates of a thread, in registers; not measured yet
constexpr int INDEX_BITS = 12;
static_assert(1 << INDEX_BITS == MAX_CANDIDATES, "a key holds the order of a score and an index");

// Node n of a row, whose ancestors `above(node)` leads to. Nodes from n_nodes on are inert: nobody's descendant.
template <typename Above>
__device__ void write_node(const BuildTree& t, int64_t row, int n, int n_nodes, Above above) {
  const int words = (t.nodes + WORD - 1) / WORD;
  uint64_t seen[MAX_WORDS] = {};
  int depth = 1;
  if (n < n_nodes) {
    depth = -1;
    for (int node = n; node >= 0; node = node == 0 ? -1 : above(node)) {  // a draft is a dozen levels deep
      depth++;
#pragma unroll
      for (int w = 0; w < MAX_WORDS; w++) seen[w] |= node / WORD == w ? uint64_t(1) << node % WORD : 0;
    }
  }
  const int64_t at = row * t.nodes + n;
  t.depth[at] = depth;
#pragma unroll
  for (int w = 0; w < MAX_WORDS; w++)
    if (w < words) t.visible[at * words + w] = static_cast<int64_t>(seen[w]);
}

// A row with forced ids has no candidates: its tree is their chain.
__device__ void write_chain(const BuildTree& t, int64_t row, int length) {
  for (int n = threadIdx.x; n < t.nodes; n += blockDim.x) {
    const int64_t at = row * t.nodes + n;
    if (n > 0) t.node_tokens[at] = n < length ? t.forced[row][n] : 0;
    t.parent[at] = n > 0 && n < length ? n - 1 : 0;
    write_node(t, row, n, length, [](int node) { return node - 1; });
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS) build_tree_kernel(const BuildTree t) {
  constexpr int WARPS = THREADS / WARP;
  __shared__ unsigned chosen[ITEMS * WARPS];  // bit c % 32 of word c / 32: candidate c is a node
  __shared__ int before[ITEMS * WARPS];       // how many are in the words before
  __shared__ int above[MAX_NODES];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  uint64_t keys[ITEMS];  // 0: no candidate
  int tokens[ITEMS], parents[ITEMS];  // loaded while the search goes on
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int c = i * THREADS + threadIdx.x;
    const bool is_there = c < t.candidates;
    const float score = is_there ? t.scores[row][c] : -INFINITY;
    tokens[i] = is_there ? t.tokens[row][c] : 0;
    parents[i] = is_there ? min(t.parents[row][c], c - 1) : -1;
    keys[i] = score > -INFINITY  // not so for NaN
                  ? static_cast<uint64_t>(order_key(score)) << INDEX_BITS | (MAX_CANDIDATES - 1 - c)
                  : 0;
  }
  if (threadIdx.x == 0) t.node_tokens[row * t.nodes] = t.root[row];
  const int n_forced = min(t.n_forced[row], t.n_ids);
  if (n_forced > 0) return write_chain(t, row, min(n_forced, t.nodes));

  Block<THREADS> block;
  const auto count = [&](uint64_t key) {
    unsigned reaching = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) reaching += keys[i] >= key;
    return block.sum(reaching);
  };
  constexpr uint64_t LOWEST = 1, HIGHEST = (uint64_t(1) << (32 + INDEX_BITS)) - 1;  // of candidates
  const uint64_t least = key_of_best(LOWEST, HIGHEST, t.nodes - 1, count);

#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const unsigned bits = __ballot_sync(ALL_LANES, keys[i] >= least);
    if (lane == 0) chosen[i * WARPS + warp] = bits;
  }
  __syncthreads();
  int n_nodes = 1;
  for (int w = 0; w < ITEMS * WARPS; w++) {
    if (w == threadIdx.x) before[w] = n_nodes - 1;
    n_nodes += __popc(chosen[w]);
  }
  __syncthreads();

  const auto chosen_up_to = [&](int c) {  // and with it
    return before[c / WARP] + __popc(chosen[c / WARP] & ((2u << c % WARP) - 1));
  };
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int c = i * THREADS + threadIdx.x;
    if (keys[i] < least) continue;
    const int node = chosen_up_to(c);
    above[node] = parents[i] < 0 ? 0 : chosen_up_to(parents[i]);
    t.node_tokens[row * t.nodes + node] = tokens[i];
  }
  __syncthreads();
  for (int n = threadIdx.x; n < t.nodes; n += THREADS) {
    const int64_t at = row * t.nodes + n;
    if (n >= n_nodes) t.node_tokens[at] = 0;
    t.parent[at] = n > 0 && n < n_nodes ? above[n] : 0;
    write_node(t, row, n, n_nodes, [&](int node) { return above[node]; });
  }
}

}  // namespace

cudaError_t build_tree(const BuildTree& arguments, cudaStream_t stream) {
  if (arguments.nodes < 1 || arguments.nodes > MAX_NODES || arguments.candidates > MAX_CANDIDATES)
    return cudaErrorInvalidValue;
  if (arguments.candidates <= ITEMS * 256)
    return launch(build_tree_kernel<256>, arguments.batch, 256, stream, arguments);
  return launch(build_tree_kernel<1024>, arguments.batch, 1024, stream, arguments);
}

}  // namespace specexit
