// A kernel launch as a function call, in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace specexit {

// Launches `blocks` of `threads` on the stream. An empty grid, which CUDA refuses, is nothing to do.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace specexit
