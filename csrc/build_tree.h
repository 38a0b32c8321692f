// The op build_tree: specexit_kernels/build_tree.py says what it means.
#pragma once

#include "tensor.h"
#include "tree.h"

namespace specexit {

constexpr int MAX_CANDIDATES = 4096;

struct BuildTree {
  Vector<const int32_t> root;      // [B]
  Matrix<const int32_t> tokens;    // [B, C]
  Matrix<const float> scores;      // [B, C]
  Matrix<const int32_t> parents;   // [B, C]
  Matrix<const int32_t> forced;    // [B, F]
  Vector<const int32_t> n_forced;  // [B]
  int batch, candidates, n_ids, nodes;  // B, C up to MAX_CANDIDATES, F, T up to MAX_NODES
  int32_t* node_tokens;  // [B, T], out
  int32_t* parent;       // [B, T], out
  int32_t* depth;        // [B, T], out
  int64_t* visible;      // [B, T, W], out
};

cudaError_t build_tree(const BuildTree& arguments, cudaStream_t stream);

}  // namespace specexit
