// Runs the kernels of planted.cuh, for tests/test_host_run.py.
//
//   planted <case> right|bug [order ...]     one line an order of threads: "right", "wrong" or "error: ..."
//   planted convert                          floats from stdin; to stdout their fp16 bits, then their bf16 bits
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "planted.cuh"

namespace {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Numbers in memory of exactly their size, aligned as device memory is.
struct Numbers {
  Numbers(int n, int salt) : size(n), data(static_cast<int*>(std::aligned_alloc(16, n * sizeof(int))), std::free) {
    for (int i = 0; i < n; i++) data.get()[i] = 1 + (i * 7 + salt * 5) % 13;
  }
  int& operator[](int i) { return data.get()[i]; }
  operator int*() { return data.get(); }
  int size;
  std::unique_ptr<int, void (*)(void*)> data;
};

bool equal(Numbers& out, int n, const std::function<int(int)>& wanted) {
  for (int i = 0; i < n; i++) {
    if (out[i] != wanted(i)) return false;
  }
  return true;
}

// `salt` makes other numbers each time: what an earlier launch left in shared memory must not be right.
template <bool BUG>
bool run(const std::string& name, int salt) {
  Numbers in(BLOCKS * THREADS, salt), out(BLOCKS * THREADS, salt + 1);
  const auto reversed = [&](int i) { return in[THREADS - 1 - i]; };
  constexpr int N = 20;
  if (name == "scan") {
    launch(scan<BUG>, BLOCKS, THREADS, in, out);
    int sum = 0;
    return equal(out, out.size, [&](int i) { return sum = in[i] + (i % THREADS ? sum : 0); });
  }
  if (name == "rounds") {
    for (int i = 0; i < in.size; i++) in[i] = i / THREADS == 1 ? 1 : in[i];  // between two rows with a 13
    launch(rounds<BUG>, 1, THREADS, in, out);
    return equal(out, out.size, [](int i) { return i / THREADS == 1 ? 1 : 13; });
  }
  if (name == "swap") {
    launch(swap<BUG>, 1, THREADS, in, out);
    return equal(out, THREADS, [&](int i) { return in[i ^ 1]; });
  }
  if (name == "count") {
    out[0] = 0;
    launch(count<BUG>, 26, 1, in, out);
    int even = 0;
    for (int i = 0; i < 26; i++) even += in[i] % 2 == 0;
    return out[0] == even;
  }
  if (name == "no_start") {
    launch(no_start<BUG>, BLOCKS, THREADS, out);
    return equal(out, out.size, [](int) { return THREADS; });
  }
  if (name == "shared_overrun") {
    launch(shared_overrun<BUG>, 1, THREADS, in, out);
    return equal(out, THREADS, reversed);
  }
  if (name == "shared_index") {
    launch(shared_index<BUG>, 1, THREADS, in, out);
    return equal(out, THREADS, reversed);
  }
  if (name == "global_overrun") {
    Numbers small(THREADS - 4, salt + 1);
    launch(global_overrun<BUG>, 3, 32, in, small, small.size);
    return equal(small, small.size, [&](int i) { return in[i]; });
  }
  if (name == "misaligned") {
    launch(misaligned<BUG>, 1, 32, in, out);
    return out[0] == in[BUG] + in[1 + BUG] + in[2 + BUG] + in[3 + BUG];
  }
  if (name == "divergent") {
    launch(divergent<BUG>, 1, THREADS, in, out);
    return equal(out, THREADS, reversed);
  }
  if (name == "early_exit") {
    launch(early_exit<BUG>, 1, 64, in, out, N);
    return equal(out, N, [&](int i) { return in[i] - in[0]; });
  }
  if (name == "missing_lane") {
    launch(missing_lane<BUG>, 1, 32, in, out, N);
    return equal(out, N, [&](int i) { return in[i + 1]; });
  }
  if (name == "absent_lane") {
    launch(absent_lane<BUG>, 1, 32, in, out);
    return equal(out, 16, [&](int i) { return in[15 - i]; });
  }
  if (name == "different") {
    launch(different<BUG>, 1, 32, in, out);
    return equal(out, 32, [](int) { return 1; });
  }
  if (name == "primitives") {
    std::vector<unsigned long long> cells{0, 0, 99};
    for (int i = 0; i < 32; i++) in[i] = (i * 37 % 32 - 9) * 3;
    for (int i = 0; i < 7; i++) out[i] = 0;
    launch(primitives, 1, 32, in, out, cells.data());
    return out[0] == 0;
  }
  if (name == "too_many_threads") {
    launch(swap<false>, 1, BUG ? 1025 : THREADS, in, out);
    return true;
  }
  if (name == "empty_grid") {
    launch(swap<false>, !BUG, THREADS, in, out);
    return true;
  }
  throw std::invalid_argument("there is no case " + name);
}

void convert() {
  std::vector<float> floats(1 << 20);
  floats.resize(std::fread(floats.data(), sizeof(float), floats.size(), stdin));
  std::vector<__half> halves;
  std::vector<__nv_bfloat16> brains;
  for (const float x : floats) {
    halves.push_back(__float2half_rn(x));
    brains.push_back(__float2bfloat16_rn(x));
  }
  std::fwrite(halves.data(), 2, halves.size(), stdout);
  std::fwrite(brains.data(), 2, brains.size(), stdout);
  // Back: every value of either format is a float, so it must come back as it was, but for what a NaN holds.
  for (unsigned bits = 0; bits < 1 << 16; bits++) {
    const float from_half = __half2float({static_cast<uint16_t>(bits)});
    const float from_brain = __bfloat162float({static_cast<uint16_t>(bits)});
    if (!isnan(from_half) && __float2half_rn(from_half).bits != bits) std::exit(1);
    if (!isnan(from_brain) && __float2bfloat16_rn(from_brain).bits != bits) std::exit(1);
    if (isnan(from_half) != ((bits & 0x7fff) > 0x7c00) || isnan(from_brain) != ((bits & 0x7fff) > 0x7f80)) std::exit(1);
  }
}

// Each pair must be equal.
bool arithmetic() {
  const std::vector<std::pair<unsigned long long, unsigned long long>> pairs = {
      {__umulhi(0xdeadbeefu, 0xcafebabeu), 0xdeadbeefull * 0xcafebabeull >> 32},
      {__umul64hi(~0ull, ~0ull), ~0ull - 1},
      {__float2ull_rn(0.5f), 0},
      {__float2ull_rn(1.5f), 2},
      {__float2ull_rn(2.5f), 2},
      {__float2ull_rn(0x1p63f), 1ull << 63},
      {__float2ull_rn(-3.0f), 0},
      {__float2ull_rn(INFINITY), ~0ull},
      {__float2ull_rn(NAN), 1ull << 63},
      {__popc(0xf0f0u), 8},
      {__popcll(~0ull), 64},
      {__ffs(0), 0},
      {__ffs(8), 4},
      {__ffsll(1ll << 40), 41},
      {__clz(1), 31},
      {__clz(0), 32},
      {__clzll(1), 63},
      {__clzll(0), 64},
      {__float_as_uint(1.0f), 0x3f800000},
      {max(-1, 2u), 0xffffffff},
      {min(3.0f, NAN), 3},
      {max(NAN, 3.0f), 3},
  };
  for (const auto& [found, wanted] : pairs) {
    if (found != wanted) return false;
  }
  volatile float a = 1.0f + 0x1p-12f, b = -(1.0f + 0x1p-11f);  // a fused product and sum would keep the last bit
  return a * a + b == 0.0f && __fmaf_rn(a, a, b) == 0x1p-24f;
}

}  // namespace

int main(int n_arguments, char** arguments) {
  const std::string name = n_arguments > 1 ? arguments[1] : "";
  if (name == "convert") {
    convert();
    return 0;
  }
  if (name == "arithmetic") {
    std::puts(arithmetic() ? "right" : "wrong");
    return 0;
  }
  const bool bug = n_arguments > 2 && std::strcmp(arguments[2], "bug") == 0;
  std::vector<std::string> orders(arguments + (n_arguments > 3 ? 3 : n_arguments), arguments + n_arguments);
  if (orders.empty()) orders.push_back("0");
  for (const std::string& order : orders) {
    const int salt = std::atoi(order.c_str());
    setenv("HOST_RUN_ORDER", order.c_str(), 1);
    try {
      std::puts((bug ? run<true>(name, salt) : run<false>(name, salt)) ? "right" : "wrong");
    } catch (const std::invalid_argument&) {
      throw;
    } catch (const std::exception& error) {
      std::printf("error: %s\n", error.what());
    }
    std::fflush(stdout);
  }
}
