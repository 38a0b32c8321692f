// The op compact_kv: specexit_kernels/compact_kv.py says what it means.
#pragma once

#include "tensor.h"

namespace specexit {

constexpr int MAX_TENSORS = 384;  // of one launch: what fits in the 4 KB that a kernel's arguments may have
constexpr int MAX_SHAPES = 8;

// Shape and strides of a cache, [B, heads, slots, hd] or, paged, [pages, page, heads, hd]; entries of `vector` bytes.
struct CacheShape {
  int64_t stride_block, stride_slot, stride_head;  // of a row of the batch, or a page
  int blocks, heads, vectors;                      // B or pages; vectors of a head's hd entries
  int slots;                                       // of a block
};

// The caches are a part of the arguments, not a table in memory that would have to be kept for them: a CUDA graph holds
// its own copy.
struct CompactKv {
  void* caches[MAX_TENSORS];
  uint8_t shape_of[MAX_TENSORS];  // index in `shapes`
  CacheShape shapes[MAX_SHAPES];
  Matrix<const int32_t> path;         // [B, D + 1]
  Vector<const int32_t> n_accepted;   // [B]
  Vector<const int32_t> lengths;      // [B]
  Matrix<const int32_t> block_table;  // [B, blocks], of paged caches
  int batch, tensors, columns, table_blocks;
  bool is_paged;
  int vector;  // bytes: 1, 2, 4, 8 or 16, which divide all addresses and strides
};
static_assert(sizeof(CompactKv) <= 4096, "CUDA's limit of a kernel's arguments");

cudaError_t compact_kv(const CompactKv& arguments, cudaStream_t stream);

}  // namespace specexit
