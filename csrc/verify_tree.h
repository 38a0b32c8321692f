// The op verify_tree: specexit_kernels/verify_tree.py says what it means.
#pragma once

#include "tensor.h"

namespace specexit {

struct VerifyTree {
  Matrix<const int32_t> tokens;   // [B, T]
  Matrix<const int32_t> parent;   // [B, T]
  Cube<const int64_t> visible;    // [B, T, W]
  Matrix<const int32_t> targets;  // [B, T]
  int batch, nodes, columns;      // B, T up to MAX_NODES, D + 1
  int32_t* path;                  // [B, D + 1], out
  int32_t* n_accepted;            // [B], out
};

cudaError_t verify_tree(const VerifyTree& arguments, cudaStream_t stream);

}  // namespace specexit
