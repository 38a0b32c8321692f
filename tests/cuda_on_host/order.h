// Which thread goes on, of those that can: an order that the environment variable HOST_RUN_ORDER draws.
//
//   0, unset   the lowest warp and its lowest lane: each thread runs as far as it can before the next one
//   even       any warp, any lane of it: warps stay near each other
//   odd        one warp as long as it can, any lane of it: it runs ahead of the others as far as barriers let it
//
// A kernel that lacks a barrier is wrong in some orders only, so tests draw many.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace host_run {

class Order {
 public:
  Order() {
    const char* text = std::getenv("HOST_RUN_ORDER");
    seed_ = text ? std::strtoull(text, nullptr, 10) : 0;
    state_ = seed_;
  }

  // One of the bits of `ready`, which is not 0.
  int lane(uint32_t ready) { return seed_ ? any(ready) : __builtin_ctz(ready); }

  int warp(uint32_t ready) {
    if (seed_ == 0) return __builtin_ctz(ready);
    if (seed_ % 2 == 0 || !(ready >> current_ & 1)) current_ = any(ready);
    return current_;
  }

  // The order of the blocks of a grid.
  std::vector<uint64_t> blocks(uint64_t count) {
    std::vector<uint64_t> order(count);
    for (uint64_t i = 0; i < count; i++) order[i] = i;
    if (seed_ == 0) return order;
    for (uint64_t i = count; i > 1; i--) std::swap(order[i - 1], order[random() % i]);
    return order;
  }

 private:
  uint64_t random() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  // The first bit at or after a random place: not all equally likely, but each is possible.
  int any(uint32_t bits) {
    const unsigned start = random() % 32;
    const uint32_t turned = bits >> start | bits << (32 - start) % 32;
    return static_cast<int>((__builtin_ctz(turned) + start) % 32);
  }

  uint64_t seed_ = 0;
  uint64_t state_ = 0;
  int current_ = 0;
};

}  // namespace host_run
