#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#ifdef HOST_RUN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef HOST_RUN_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#ifdef __x86_64__
// Saves what the System V ABI lets a callee not change, and continues on another stack.
extern "C" __attribute__((visibility("hidden"))) void host_run_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden host_run_switch
.globl host_run_switch
.type host_run_switch, @function
host_run_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size host_run_switch, . - host_run_switch
.popsection
)");
#endif

namespace host_run {
namespace {

Context* left = nullptr;  // by the latest switch: AddressSanitizer tells the bounds of a stack when it has been left

constexpr size_t STACK_SIZE = 128 * 1024;

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void enter([[maybe_unused]] Context& caller) {
#ifdef HOST_RUN_TSAN
  caller.sanitizer = __tsan_get_current_fiber();
#endif
}

void arrive([[maybe_unused]] Context& fiber) {
#ifdef HOST_RUN_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &left->stack, &left->stack_size);
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool finished) {
  left = &from;
#ifdef HOST_RUN_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#ifdef HOST_RUN_TSAN
  // To the sanitizer the fibers are threads that nothing but barriers orders.
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __x86_64__
  host_run_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive(from);
}

void before([[maybe_unused]] void* where) {
#ifdef HOST_RUN_TSAN
  __tsan_release(where);
#endif
}

void after([[maybe_unused]] void* where) {
#ifdef HOST_RUN_TSAN
  __tsan_acquire(where);
#endif
}

void FiberPool::prepare(Context& fiber, void (*entry)()) {
  if (n_used_ == parts_.size()) grow();
  const Part& part = parts_[n_used_++];
  fiber = Context{};
  fiber.stack = part.stack;
  fiber.stack_size = STACK_SIZE;
  fiber.sanitizer = part.view;
#ifdef __x86_64__
  // The frame that host_run_switch leaves: six registers, the address to return to, and the word above it, so that
  // `entry` finds the stack aligned as after a call.
  constexpr ptrdiff_t REGISTERS = 6;
  void** top = reinterpret_cast<void**>(part.stack + STACK_SIZE);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (ptrdiff_t i = 1; i <= REGISTERS; i++) top[-2 - i] = nullptr;
  fiber.stack_pointer = top - 2 - REGISTERS;
#else
  getcontext(&fiber.registers);
  fiber.registers.uc_stack.ss_sp = part.stack;
  fiber.registers.uc_stack.ss_size = STACK_SIZE;
  fiber.registers.uc_link = nullptr;
  makecontext(&fiber.registers, entry, 0);
#endif
}

void FiberPool::end_block([[maybe_unused]] size_t size) {
#ifdef HOST_RUN_TSAN
  constexpr size_t MAX_VIEWS = 1024;  // or two blocks of more than half as many threads
  if (n_used_ + size > MAX_VIEWS && n_used_ > size) n_used_ = 0;
#else
  n_used_ = 0;
#endif
}

void FiberPool::abandon([[maybe_unused]] void* where) {
#ifdef HOST_RUN_ASAN
  for (const Part& part : parts_) __asan_unpoison_memory_region(part.stack, STACK_SIZE);
#endif
#ifdef HOST_RUN_TSAN
  void* const self = __tsan_get_current_fiber();
  for (const Part& part : parts_) {
    __tsan_switch_to_fiber(part.view, __tsan_switch_to_fiber_no_sync);
    before(where);
  }
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
  clear();
#endif
  n_used_ = 0;
}

void FiberPool::grow() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* region = mmap(nullptr, STACK_SIZE + page_size(), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (region == MAP_FAILED) throw std::bad_alloc();
  mprotect(region, page_size(), PROT_NONE);
  Part part{static_cast<char*>(region) + page_size(), nullptr};
#ifdef HOST_RUN_TSAN
  part.view = __tsan_create_fiber(0);
#endif
  parts_.push_back(part);
}

void FiberPool::clear() {
  for (const Part& part : parts_) {
    munmap(part.stack - page_size(), STACK_SIZE + page_size());
#ifdef HOST_RUN_TSAN
    __tsan_destroy_fiber(part.view);
#endif
  }
  parts_.clear();
}

}  // namespace host_run
