// Compaction of the KV cache: a thread moves one vector of a head, in one layer's keys or values, for all accepted nodes.
//
// Paths ascend, so the i-th accepted node lies at or after slot i, and each later one beyond it: copying in order, a
// thread overwrites no slot that it has still to read, and no two threads share a vector. It reads several before it
// writes them, so that their latencies overlap.
#include "compact_kv.h"

#include "launch.h"

namespace specexit {
namespace {

constexpr int THREADS = 128;  // not measured yet, as HELD
constexpr int HELD = 8;       // vectors that a thread has in flight

// A row's slot as an offset in the cache; -1 where there is no such slot, which only a wrong path or length names.
__device__ int64_t offset_of(const CompactKv& c, const CacheShape& shape, int64_t row, int slot) {
  if (slot < 0) return -1;
  int64_t block = row;
  if (c.is_paged) {
    if (slot / shape.slots >= c.table_blocks) return -1;
    block = c.block_table[row][slot / shape.slots];
    slot %= shape.slots;
  }
  if (block < 0 || block >= shape.blocks || slot >= shape.slots) return -1;
  return block * shape.stride_block + slot * shape.stride_slot;
}

template <typename Bytes>
__global__ void __launch_bounds__(THREADS) compact_kv_kernel(const __grid_constant__ CompactKv c) {
  const int64_t row = blockIdx.x;
  const Vector<const int32_t> path = c.path[row];
  const int n = min(c.n_accepted[row], c.columns);
  bool moves = false;
  for (int i = 1; i < n; i++) moves |= path[i] != i;
  if (!moves) return;

  const CacheShape& shape = c.shapes[c.shape_of[blockIdx.z]];
  const int index = blockIdx.y * THREADS + threadIdx.x;
  if (index >= shape.heads * shape.vectors) return;
  Bytes* const cache = static_cast<Bytes*>(c.caches[blockIdx.z]) + index / shape.vectors * shape.stride_head +
                       index % shape.vectors;
  const int base = c.lengths[row] - n;
  for (int first = 1; first < n; first += HELD) {
    Bytes held[HELD];
    bool fits[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      const int i = first + j;
      fits[j] = false;
      if (i >= n || path[i] == i) continue;
      const int64_t source = offset_of(c, shape, row, base + path[i]);
      fits[j] = source >= 0;
      if (fits[j]) held[j] = cache[source];
    }
#pragma unroll
    for (int j = 0; j < HELD; j++) {
      if (!fits[j]) continue;
      const int64_t target = offset_of(c, shape, row, base + first + j);
      if (target >= 0) cache[target] = held[j];
    }
  }
}

template <typename Bytes>
cudaError_t launch_for(const CompactKv& arguments, cudaStream_t stream) {
  int most = 0;
  for (int i = 0; i < arguments.tensors; i++) {
    const CacheShape& shape = arguments.shapes[arguments.shape_of[i]];
    most = shape.heads * shape.vectors > most ? shape.heads * shape.vectors : most;
  }
  const dim3 blocks(arguments.batch, (most + THREADS - 1) / THREADS, arguments.tensors);
  return launch(compact_kv_kernel<Bytes>, blocks, THREADS, stream, arguments);
}

}  // namespace

cudaError_t compact_kv(const CompactKv& arguments, cudaStream_t stream) {
  if (arguments.tensors > MAX_TENSORS) return cudaErrorInvalidValue;
  switch (arguments.vector) {
    case 1: return launch_for<uint8_t>(arguments, stream);
    case 2: return launch_for<uint16_t>(arguments, stream);
    case 4: return launch_for<uint32_t>(arguments, stream);
    case 8: return launch_for<uint2>(arguments, stream);
    case 16: return launch_for<uint4>(arguments, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace specexit
