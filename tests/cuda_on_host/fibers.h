// Threads of a block as fibers: stacks of their own on one system thread, and a switch that costs nanoseconds.
//
// This file and those that include it are compiled without a sanitizer, so that the scheduler's own data, which all
// fibers share, is not under test. With HOST_RUN_ASAN or HOST_RUN_TSAN they tell the kernels' sanitizer of switches.
#pragma once

#include <cstddef>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host_run {

// What is kept of a fiber, or of the system thread that runs them, while another one runs.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;  // lowest address
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* sanitizer = nullptr;   // ThreadSanitizer's view of the fiber
};

// The context of the caller, to come back to.
void enter(Context& caller);

// To be called first by an entry.
void arrive(Context& fiber);

// Go on with `to`; return when something switches back to `from`, never if it is `finished`.
void switch_context(Context& from, Context& to, bool finished = false);

// All that the calling fiber did before `before(where)` is seen by a fiber after its `after(where)`.
void before(void* where);
void after(void* where);

// What fibers are made of: stacks, each with a page below it that cannot be touched, and ThreadSanitizer's views.
//
// To ThreadSanitizer a view is a thread, and it finds no race between two blocks whose fibers share one. But they are
// dear to make (1 MB and 1 ms), so they serve again in the next launch, and within one after some other blocks.
class FiberPool {
 public:
  FiberPool() = default;
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;
  ~FiberPool() { clear(); }

  // A fiber that will run `entry`, which must not return. Throws std::bad_alloc.
  void prepare(Context& fiber, void (*entry)());

  // Its fibers, `size` of them, have finished.
  void end_block(size_t size);

  // After an error: they are left in the middle. What they did, until now, is before `where`.
  void abandon(void* where);
  void end_launch() { n_used_ = 0; }

 private:
  struct Part {
    char* stack;
    void* view;
  };
  void grow();
  void clear();

  std::vector<Part> parts_;
  size_t n_used_ = 0;
};

}  // namespace host_run
