// Kernels as plain C++: qualifiers, built-in variables, the launch and the barriers of a block.
//
// Every CUDA thread of a block is a fiber (fibers.h) and runs until it waits in a barrier or in a warp primitive;
// scheduler.cpp decides who goes on. Blocks run one after another, so a block that waited for a later one would never
// end. What a GPU leaves undefined and the scheduler sees (a barrier that some threads do not reach, lanes that are
// missing from a warp primitive) is thrown out of the launch as std::runtime_error.
#pragma once

#include <cuda_runtime_api.h>

#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// A variable of the program is as shared as one of the block, as blocks run one after another. Each block finds garbage
// in it, but for ThreadSanitizer.
#ifdef HOST_RUN_TSAN
// ThreadSanitizer would report two blocks that use one variable. There each block runs on a system thread of its own.
#define __shared__ static thread_local
#else
#define __shared__ static
#endif

// Set by the scheduler before it lets a thread go on.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace host_run {

enum class Primitive {
  syncthreads, syncthreads_count, syncthreads_or, syncthreads_and,
  syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot, any, all,
  reduce_add, reduce_min, reduce_max, reduce_min_signed, reduce_max_signed, reduce_and, reduce_or, reduce_xor,
};

// Wait until every thread of the block is here; the number of threads whose predicate holds.
int barrier(Primitive primitive, bool predicate, const char* file, int line);

// Run `body(call)` once for each thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(const void* call), const void* call);

}  // namespace host_run

// The defaults name the caller's line: threads that wait in different barriers are told apart by it.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host_run::barrier(host_run::Primitive::syncthreads, false, file, line);
}

inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return host_run::barrier(host_run::Primitive::syncthreads_count, predicate != 0, file, line);
}

inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return host_run::barrier(host_run::Primitive::syncthreads_or, predicate != 0, file, line) != 0;
}

inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return host_run::barrier(host_run::Primitive::syncthreads_and, predicate == 0, file, line) == 0;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a kernel's arguments are copied byte by byte");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  return host_run::launch(
      *config,
      [](const void* opaque) {
        const Call& call = *static_cast<const Call*>(opaque);
        std::apply(call.kernel, call.arguments);  // by value: every thread has its own copy
      },
      &call);
}

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
