// The op accept: specexit_kernels/accept.py says what it means.
#pragma once

#include "state.h"
#include "tensor.h"

namespace specexit {

struct Accept {
  Matrix<const int32_t> tokens;     // [B, T]
  Matrix<const int32_t> parent;     // [B, T]
  Matrix<const int32_t> depth;      // [B, T]
  Cube<const int64_t> visible;      // [B, T, W]
  Matrix<const int32_t> targets;    // [B, T]
  Vector<const int32_t> stop_ids;   // [n]
  State state;                      // changed
  int batch, nodes, columns;        // B, T up to MAX_NODES, D + 1
  int n_stop_ids, n_ids;            // n, F
  int32_t* path;                    // [B, D + 1], out
  int32_t* n_accepted;              // [B], out
  int32_t* next_token;              // [B], out
};

cudaError_t accept(const Accept& arguments, cudaStream_t stream);

}  // namespace specexit
