// Atomics, relaxed as CUDA's are: they order no other access, and ThreadSanitizer knows it. Each returns the old value.
#pragma once

#include <cstring>

namespace host_run {

template <class T>
T atomic_add(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// Replace what is at the address by `change` of it.
template <class T, class Change>
T atomic_change(T* address, Change change) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, change(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace host_run

#define HOST_RUN_ATOMICS(type)                                                                           \
  inline type atomicAdd(type* address, type value) { return host_run::atomic_add(address, value); }      \
  inline type atomicMax(type* address, type value) {                                                     \
    return host_run::atomic_change(address, [value](type old) { return old < value ? value : old; });    \
  }                                                                                                      \
  inline type atomicMin(type* address, type value) {                                                     \
    return host_run::atomic_change(address, [value](type old) { return value < old ? value : old; });    \
  }                                                                                                      \
  inline type atomicExch(type* address, type value) {                                                    \
    return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);                                        \
  }                                                                                                      \
  inline type atomicOr(type* address, type value) { return __atomic_fetch_or(address, value, __ATOMIC_RELAXED); }  \
  inline type atomicAnd(type* address, type value) { return __atomic_fetch_and(address, value, __ATOMIC_RELAXED); } \
  inline type atomicCAS(type* address, type expected, type value) {                                      \
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);   \
    return expected;                                                                                     \
  }
HOST_RUN_ATOMICS(int)
HOST_RUN_ATOMICS(unsigned)
HOST_RUN_ATOMICS(unsigned long long)
#undef HOST_RUN_ATOMICS

inline float atomicAdd(float* address, float value) {
  const auto add = [value](unsigned old) {
    float sum;
    std::memcpy(&sum, &old, sizeof(sum));
    sum += value;
    std::memcpy(&old, &sum, sizeof(sum));
    return old;
  };
  const unsigned old = host_run::atomic_change(reinterpret_cast<unsigned*>(address), add);
  float result;
  std::memcpy(&result, &old, sizeof(result));
  return result;
}
