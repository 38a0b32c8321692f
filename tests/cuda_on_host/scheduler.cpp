// Runs a grid: its blocks one after another, and the threads of a block as fibers, which meet in barriers and warp
// primitives.
#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#ifdef HOST_RUN_TSAN
#include <thread>
#endif

#include "fibers.h"
#include "order.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// All `__shared__` variables: the build gathers them in a section, whose ends the linker names.
extern "C" {
extern volatile char __start_host_run_shared[] __attribute__((weak, visibility("hidden")));
extern volatile char __stop_host_run_shared[] __attribute__((weak, visibility("hidden")));
}

namespace host_run {
namespace {

constexpr int LANES = 32;
constexpr unsigned MAX_THREADS = 1024;

struct Place {  // where a thread waits
  Primitive primitive;
  const char* file;
  int line;

  bool operator!=(const Place& other) const {
    return primitive != other.primitive || line != other.line || (file != other.file && std::strcmp(file, other.file));
  }
};

struct Thread : Context {
  uint3 index;
  unsigned linear;
  Place place;
  bool finished;
  uint64_t result;  // of the warp primitive that it waited in
};

// Lanes of one mask on their way to the same primitive.
struct Meeting {
  uint32_t mask = 0;
  uint32_t arrived = 0;
  Place place;
  uint64_t value[LANES];
  int source[LANES];
  unsigned generation = 0;
  char order[2];  // for before() and after(); two, as lanes may be in the next meeting while others leave this one
};

struct Warp {
  uint32_t ready = 0;
  Meeting meetings[LANES];  // by the lowest lane of the mask: masks of meetings at one time do not overlap
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;
  unsigned n_finished = 0;
  Context scheduler;
  Thread* current = nullptr;
  std::string error;

  unsigned n_in_barrier = 0;
  Place barrier_place;
  int n_true = 0;
  int barrier_result = 0;
  unsigned barrier_generation = 0;
  char barrier_order[2];

  void (*body)(const void*) = nullptr;
  const void* call = nullptr;
};

std::mutex one_launch;  // at a time: what follows is of the block that runs
Block* block = nullptr;
FiberPool fibers;
char start_of_block, end_of_kernel;  // for before() and after()

const char* name(Primitive primitive) {
  static const char* const names[] = {
      "__syncthreads",     "__syncthreads_count", "__syncthreads_or",  "__syncthreads_and", "__syncwarp",
      "__shfl_sync",       "__shfl_up_sync",      "__shfl_down_sync",  "__shfl_xor_sync",   "__ballot_sync",
      "__any_sync",        "__all_sync",          "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
      "__reduce_min_sync", "__reduce_max_sync",   "__reduce_and_sync", "__reduce_or_sync",  "__reduce_xor_sync",
  };
  return names[static_cast<int>(primitive)];
}

std::string text(const Place& place) {
  return std::string(name(place.primitive)) + " at " + place.file + ":" + std::to_string(place.line);
}

std::string text(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

void make_ready(unsigned warp, uint32_t lanes) {
  block->warps[warp].ready |= lanes;
  block->ready_warps |= 1u << warp;
}

void wait() { switch_context(*block->current, block->scheduler); }

// The scheduler reports the error; what the threads had on their stacks is abandoned.
[[noreturn]] void fail(const std::string& what) {
  const uint3 index = block->current->index;
  block->error = what + "; thread " + text(index.x, index.y, index.z);
  for (;;) wait();
}

void run_thread() {
  arrive(*block->current);
  after(&start_of_block);
  block->body(block->call);
  before(&end_of_kernel);
  block->current->finished = true;
  block->n_finished++;
  switch_context(*block->current, block->scheduler, true);
  std::abort();
}

std::string deadlock() {
  const size_t n = block->threads.size();
  std::string what = "no thread can go on: ";
  what += std::to_string(block->n_finished) + " of " + std::to_string(n) + " have returned";
  constexpr int SHOWN = 4;
  int shown = 0;
  const Thread* last = nullptr;
  for (const Thread& thread : block->threads) {
    if (thread.finished || (last && !(thread.place != last->place))) continue;
    if (shown++ == SHOWN) break;
    what += ", thread " + text(thread.index.x, thread.index.y, thread.index.z) + " waits in " + text(thread.place);
    last = &thread;
  }
  return what;
}

// What a kernel finds in shared memory is nothing that it may rely on.
void spoil_shared_memory() {
  for (volatile char* at = __start_host_run_shared; at != __stop_host_run_shared; at++) *at = '\xcb';
}

void run_block(Order& order) {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  Block& b = *block;
  b.threads.resize(n);
  b.warps.resize((n + LANES - 1) / LANES);
  spoil_shared_memory();
  enter(b.scheduler);
  before(&start_of_block);
  for (unsigned i = 0; i < n; i++) {
    Thread& thread = b.threads[i];
    fibers.prepare(thread, run_thread);
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    thread.linear = i;
    thread.finished = false;
    make_ready(i / LANES, 1u << i % LANES);
  }
  while (b.n_finished < n && b.error.empty()) {
    if (b.ready_warps == 0) {
      b.error = deadlock();
      break;
    }
    const int w = order.warp(b.ready_warps);
    const int lane = order.lane(b.warps[w].ready);
    b.warps[w].ready &= ~(1u << lane);
    if (b.warps[w].ready == 0) b.ready_warps &= ~(1u << w);
    b.current = &b.threads[w * LANES + lane];
    threadIdx = b.current->index;
    switch_context(b.scheduler, *b.current);
  }
  if (b.error.empty()) {
    fibers.end_block(n);
  } else {
    fibers.abandon(&end_of_kernel);
  }
}

uint64_t reduce(const Meeting& meeting) {
  uint64_t bits = 0;
  uint32_t result = 0;
  bool first = true;
  for (int i = 0; i < LANES; i++) {
    if (!(meeting.mask >> i & 1)) continue;
    const uint32_t value = static_cast<uint32_t>(meeting.value[i]);
    const int as_signed = static_cast<int>(value), result_signed = static_cast<int>(result);
    bits |= static_cast<uint64_t>(value & 1) << i;
    switch (meeting.place.primitive) {
      case Primitive::reduce_add: result += value; break;
      case Primitive::reduce_min: result = first ? value : std::min(result, value); break;
      case Primitive::reduce_max: result = first ? value : std::max(result, value); break;
      case Primitive::reduce_min_signed: result = first || as_signed < result_signed ? value : result; break;
      case Primitive::reduce_max_signed: result = first || as_signed > result_signed ? value : result; break;
      case Primitive::reduce_and: result = first ? value : result & value; break;
      case Primitive::reduce_or: result |= value; break;
      case Primitive::reduce_xor: result ^= value; break;
      default: break;
    }
    first = false;
  }
  return meeting.place.primitive >= Primitive::reduce_add ? result : bits;
}

// The last lane has arrived: every lane gets its result.
void close(Meeting& meeting, unsigned warp) {
  const Primitive primitive = meeting.place.primitive;
  const bool shuffles = primitive >= Primitive::shfl && primitive <= Primitive::shfl_xor;
  const uint64_t common = shuffles || primitive == Primitive::syncwarp ? 0 : reduce(meeting);
  for (int i = 0; i < LANES; i++) {
    if (!(meeting.mask >> i & 1)) continue;
    const int source = meeting.source[i];
    if (shuffles && !(meeting.mask >> source & 1)) {
      fail(text(meeting.place) + ": lane " + std::to_string(i) + " reads lane " + std::to_string(source) +
           ", which is not in the mask");
    }
    block->threads[warp * LANES + i].result = shuffles ? meeting.value[source] : common;
  }
  meeting.arrived = 0;
  meeting.generation++;
}

}  // namespace

int barrier(Primitive primitive, bool predicate, const char* file, int line) {
  Block& b = *block;
  Thread& self = *b.current;
  self.place = {primitive, file, line};
  if (b.n_in_barrier && self.place != b.barrier_place) {
    fail("divergent barrier: " + text(self.place) + " while others wait in " + text(b.barrier_place));
  }
  b.barrier_place = self.place;
  b.n_true += predicate;
  // Two places, by turns: a thread that leaves must not see what faster ones did on their way to the next barrier.
  char* order = &b.barrier_order[b.barrier_generation % 2];
  before(order);
  if (++b.n_in_barrier == b.threads.size()) {
    b.barrier_result = b.n_true;
    b.n_true = 0;
    b.n_in_barrier = 0;
    b.barrier_generation++;
    for (const Thread& thread : b.threads) make_ready(thread.linear / LANES, 1u << thread.linear % LANES);
  }
  wait();  // the last one too: who goes on first is the order's choice
  after(order);
  return b.barrier_result;
}

uint64_t exchange(Primitive primitive, unsigned mask, uint64_t value, int source, const char* file, int line) {
  Thread& self = *block->current;
  const unsigned warp = self.linear / LANES;
  const int lane = static_cast<int>(self.linear % LANES);
  self.place = {primitive, file, line};
  if (!(mask >> lane & 1)) fail(text(self.place) + ": lane " + std::to_string(lane) + " is not in its own mask");
  Meeting& meeting = block->warps[warp].meetings[__builtin_ctz(mask)];
  if (meeting.arrived && (meeting.mask != mask || meeting.place != self.place)) {
    fail("lanes of a warp differ: " + text(self.place) + " while others wait in " + text(meeting.place) +
         (meeting.mask != mask ? " with another mask" : ""));
  }
  meeting.mask = mask;
  meeting.place = self.place;
  meeting.value[lane] = value;
  meeting.source[lane] = source;
  meeting.arrived |= 1u << lane;
  char* order = &meeting.order[meeting.generation % 2];
  if (primitive == Primitive::syncwarp) before(order);
  if (meeting.arrived == mask) {
    close(meeting, warp);
    make_ready(warp, mask);
  }
  wait();
  if (primitive == Primitive::syncwarp) after(order);
  return self.result;
}

cudaError_t launch(const cudaLaunchConfig_t& config, void (*body)(const void* call), const void* call) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t n_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      n_threads == 0 || n_threads > MAX_THREADS || threads.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes || config.numAttrs) return cudaErrorNotSupported;

  const std::lock_guard<std::mutex> lock(one_launch);
  Order order;
  blockDim = threads;
  gridDim = grid;
  std::string error;
  for (const uint64_t i : order.blocks(uint64_t{grid.x} * grid.y * grid.z)) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    Block state;
    state.body = body;
    state.call = call;
    block = &state;
#ifdef HOST_RUN_TSAN
    // Its `__shared__` variables are new memory, of which the sanitizer knows nothing yet.
    std::thread([&order] { run_block(order); }).join();
#else
    run_block(order);
#endif
    block = nullptr;
    if (!state.error.empty()) {
      after(&end_of_kernel);  // a fiber wrote the error
      error = state.error + " of block " + text(blockIdx.x, blockIdx.y, blockIdx.z);
      break;
    }
  }
  after(&end_of_kernel);
  fibers.end_launch();
  if (!error.empty()) throw std::runtime_error(error);
  return cudaSuccess;
}

}  // namespace host_run
