// Warp primitives. All lanes of the mask must come to the same one, at the same line, before any goes on. As in CUDA's
// memory model, only `__syncwarp` orders the lanes' accesses to memory.
#pragma once

#include "block.h"

#include <cstring>

namespace host_run {

constexpr unsigned EVERY_LANE = 0xffffffffu;

// Give `value` to the other lanes of the mask and wait for theirs. What comes back: for a shuffle the value of lane
// `source`; for a vote the bits of the lanes that gave 1; for a reduction its result.
uint64_t exchange(Primitive primitive, unsigned mask, uint64_t value, int source, const char* file, int line);

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

template <class T>
T shuffle(Primitive primitive, unsigned mask, T value, int source, const char* file, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(primitive, mask, bits, source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned vote(Primitive primitive, unsigned mask, int predicate, const char* file, int line) {
  return static_cast<unsigned>(exchange(primitive, mask, predicate != 0, 0, file, line));
}

}  // namespace host_run

inline void __syncwarp(unsigned mask = host_run::EVERY_LANE, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  host_run::exchange(host_run::Primitive::syncwarp, mask, 0, 0, file, line);
}

// `width` parts the warp into segments. A lane whose source would lie beyond its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const int first = host_run::lane() & -width;
  return host_run::shuffle(host_run::Primitive::shfl, mask, value, first | (source & (width - 1)), file, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int own = host_run::lane();
  const int source = own - static_cast<int>(delta);
  const bool inside = source >= (own & -width);
  return host_run::shuffle(host_run::Primitive::shfl_up, mask, value, inside ? source : own, file, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int own = host_run::lane();
  const int source = own + static_cast<int>(delta);
  const bool inside = source <= (own | (width - 1));
  return host_run::shuffle(host_run::Primitive::shfl_down, mask, value, inside ? source : own, file, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int own = host_run::lane();
  const int source = own ^ bits;
  const bool inside = source <= (own | (width - 1));  // earlier segments can be read, as in CUDA
  return host_run::shuffle(host_run::Primitive::shfl_xor, mask, value, inside ? source : own, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  return host_run::vote(host_run::Primitive::ballot, mask, predicate, file, line);
}

inline int __any_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return host_run::vote(host_run::Primitive::any, mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  return host_run::vote(host_run::Primitive::all, mask, predicate, file, line) == mask;
}

#define HOST_RUN_REDUCTION(name, type, primitive)                                                            \
  inline type name(unsigned mask, type value, const char* file = __builtin_FILE(),                           \
                   int line = __builtin_LINE()) {                                                            \
    const uint64_t bits = static_cast<unsigned>(value);                                                      \
    return static_cast<type>(host_run::exchange(host_run::Primitive::primitive, mask, bits, 0, file, line)); \
  }
HOST_RUN_REDUCTION(__reduce_add_sync, unsigned, reduce_add)
HOST_RUN_REDUCTION(__reduce_add_sync, int, reduce_add)
HOST_RUN_REDUCTION(__reduce_min_sync, unsigned, reduce_min)
HOST_RUN_REDUCTION(__reduce_min_sync, int, reduce_min_signed)
HOST_RUN_REDUCTION(__reduce_max_sync, unsigned, reduce_max)
HOST_RUN_REDUCTION(__reduce_max_sync, int, reduce_max_signed)
HOST_RUN_REDUCTION(__reduce_and_sync, unsigned, reduce_and)
HOST_RUN_REDUCTION(__reduce_or_sync, unsigned, reduce_or)
HOST_RUN_REDUCTION(__reduce_xor_sync, unsigned, reduce_xor)
#undef HOST_RUN_REDUCTION
