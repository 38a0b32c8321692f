// Kernels that are right (BUG = false), and the same kernels with a bug in them.
#pragma once

#include <cuda_runtime.h>

namespace {

constexpr unsigned FULL = 0xffffffff;
constexpr int THREADS = 96;
constexpr int BLOCKS = 3;

// Sums of all numbers up to each one, block by block. Bug: a warp reads the others' sums before they are written.
template <bool BUG>
__global__ void __launch_bounds__(THREADS) scan(const int* __restrict__ in, int* __restrict__ out) {
  __shared__ int warp_sums[THREADS / 32];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, at = blockIdx.x * THREADS + t;
  int sum = in[at];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(FULL, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) warp_sums[warp] = sum;
  if constexpr (!BUG) __syncthreads();
  for (int w = 0; w < warp; w++) sum += warp_sums[w];
  out[at] = sum;
}

// The largest number of each row of THREADS. Bug: the next row is begun while some still read the last one's.
template <bool BUG>
__global__ void rounds(const int* in, int* out) {
  __shared__ int row[THREADS];
  for (int r = 0; r < BLOCKS; r++) {
    row[threadIdx.x] = in[r * THREADS + threadIdx.x];
    __syncthreads();
    int best = 0;
    for (int i = 0; i < THREADS; i++) best = max(best, row[i]);
    out[r * THREADS + threadIdx.x] = best;
    if constexpr (!BUG) __syncthreads();
  }
}

// Lanes swap with their neighbours through shared memory. Bug: they do not wait for each other.
template <bool BUG>
__global__ void swap(const int* in, int* out) {
  __shared__ int values[THREADS];
  const int t = threadIdx.x;
  values[t] = in[t];
  if constexpr (!BUG) __syncwarp();
  out[t] = values[t ^ 1];
}

// How many numbers are even: of all blocks. Bug: blocks (of one thread) add without an atomic.
template <bool BUG>
__global__ void count(const int* in, int* out) {
  if (in[blockIdx.x] % 2) return;
  if constexpr (BUG) {
    *out += 1;
  } else {
    atomicAdd(out, 1);
  }
}

// How many threads there are. Bug: nobody sets the counter to 0.
template <bool BUG>
__global__ void no_start(int* out) {
  __shared__ int total;
  if (!BUG && threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1);
  __syncthreads();
  out[blockIdx.x * THREADS + threadIdx.x] = total;
}

// Numbers in reverse. Bug: the index is one too high, which a pointer hides from the compiler.
template <bool BUG>
__global__ void shared_overrun(const int* in, int* out) {
  __shared__ int values[THREADS];
  int* volatile hidden = values;
  int* const place = hidden + BUG;
  place[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = place[THREADS - 1 - threadIdx.x];
}

template <bool BUG>
__global__ void shared_index(const int* in, int* out) {
  __shared__ int values[THREADS];
  values[threadIdx.x + BUG] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[THREADS - 1 - threadIdx.x + BUG];
}

// Copies `n` numbers. Bug: one thread too many takes part.
template <bool BUG>
__global__ void global_overrun(const int* in, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + BUG) out[i] = in[i];
}

// Bug: 16 bytes are read where only 4 are aligned.
template <bool BUG>
__global__ void misaligned(const int* in, int* out) {
  const uint4 four = *reinterpret_cast<const uint4*>(in + BUG);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

// Bug: the first warp waits in a barrier of its own.
template <bool BUG>
__global__ void divergent(const int* in, int* out) {
  __shared__ int values[THREADS];
  values[threadIdx.x] = in[threadIdx.x];
  if (BUG && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = values[THREADS - 1 - threadIdx.x];
}

// Bug: threads that have nothing to do leave before the barrier.
template <bool BUG>
__global__ void early_exit(const int* in, int* out, int n) {
  __shared__ int first;
  const int t = threadIdx.x;
  if (BUG && t >= n) return;
  if (t == 0) first = in[0];
  __syncthreads();
  if (t < n) out[t] = in[t] - first;
}

// Bug: lanes without a number do not come to the shuffle whose mask names them.
template <bool BUG>
__global__ void missing_lane(const int* in, int* out, int n) {
  const int lane = threadIdx.x;
  if (BUG && lane >= n) return;
  const int next = __shfl_down_sync(FULL, in[lane], 1);
  if (lane < n) out[lane] = next;
}

// Half a warp. Bug: it reads from the other half, which the mask does not name.
template <bool BUG>
__global__ void absent_lane(const int* in, int* out) {
  const int lane = threadIdx.x;
  if (lane >= 16) return;
  out[lane] = __shfl_sync(0xffffu, in[lane], BUG ? lane + 16 : 15 - lane);
}

// Bug: half of the warp votes in another primitive.
template <bool BUG>
__global__ void different(const int* in, int* out) {
  const int lane = threadIdx.x;
  const int odd = in[lane] % 2;
  if (BUG && lane < 16) {
    out[lane] = __any_sync(FULL, odd);
  } else {
    out[lane] = __ballot_sync(FULL, odd) != 0;
  }
}

// Every warp primitive and atomic, against the same in plain loops; out[0] counts what differs.
__global__ void primitives(const int* in, int* out, unsigned long long* cells) {
  const int lane = threadIdx.x;
  const int own = in[lane];
  const long long wide = own * 10000000000ll;
  int sum = 0, low = own, high = own;
  unsigned low_unsigned = own, high_unsigned = own, odd = 0, all_bits = ~0u, any_bits = 0, flipped = 0;
  for (int i = 0; i < 32; i++) {
    sum += in[i];
    low = min(low, in[i]);
    high = max(high, in[i]);
    low_unsigned = min(low_unsigned, static_cast<unsigned>(in[i]));
    high_unsigned = max(high_unsigned, static_cast<unsigned>(in[i]));
    odd |= (in[i] & 1u) << i;
    all_bits &= in[i];
    any_bits |= in[i];
    flipped ^= in[i];
  }
  int bad = 0;
  bad += __reduce_add_sync(FULL, own) != sum;
  bad += __reduce_add_sync(FULL, static_cast<unsigned>(own)) != static_cast<unsigned>(sum);
  bad += __reduce_min_sync(FULL, own) != low;
  bad += __reduce_max_sync(FULL, own) != high;
  bad += __reduce_min_sync(FULL, static_cast<unsigned>(own)) != low_unsigned;
  bad += __reduce_max_sync(FULL, static_cast<unsigned>(own)) != high_unsigned;
  bad += __reduce_and_sync(FULL, own) != all_bits;
  bad += __reduce_or_sync(FULL, own) != any_bits;
  bad += __reduce_xor_sync(FULL, own) != flipped;
  bad += __ballot_sync(FULL, own & 1) != odd;
  bad += __any_sync(FULL, own == high) != 1 || __any_sync(FULL, own > high) != 0;
  bad += __all_sync(FULL, own <= high) != 1 || __all_sync(FULL, own < high) != 0;
  bad += __shfl_sync(FULL, own, lane + 35) != in[(lane + 3) % 32];
  bad += __shfl_sync(FULL, own, 5, 8) != in[lane / 8 * 8 + 5];
  bad += __shfl_xor_sync(FULL, wide, 9) != in[lane ^ 9] * 10000000000ll;
  bad += __shfl_xor_sync(FULL, own, 16, 16) != in[lane < 16 ? lane : lane - 16];
  bad += __shfl_up_sync(FULL, own * 0.5f, 3) != in[lane < 3 ? lane : lane - 3] * 0.5f;
  bad += __shfl_up_sync(FULL, own, 3, 8) != in[lane % 8 < 3 ? lane : lane - 3];
  bad += __shfl_down_sync(FULL, own * 0.5, 30) != in[lane > 1 ? lane : lane + 30] * 0.5;
  bad += __shfl_down_sync(FULL, own, 3, 8) != in[lane % 8 > 4 ? lane : lane + 3];
  bad += __syncthreads_count(own & 1) != __popc(odd);
  bad += __syncthreads_or(lane == 7) != 1 || __syncthreads_or(0) != 0;
  bad += __syncthreads_and(lane < 32) != 1 || __syncthreads_and(lane < 31) != 0;
  atomicAdd(&cells[0], 1ull << lane);
  atomicMax(&cells[1], static_cast<unsigned long long>(lane));
  atomicMin(&cells[2], static_cast<unsigned long long>(lane + 4));
  atomicMax(out + 1, own);
  atomicMin(out + 2, own);
  atomicAdd(reinterpret_cast<unsigned*>(out) + 3, 2u);
  atomicOr(reinterpret_cast<unsigned*>(out) + 4, 1u << lane);
  if (atomicCAS(out + 5, 0, lane + 1) == 0) atomicAdd(out + 6, 1);
  __syncthreads();
  bad += cells[0] != 0xffffffffull || cells[1] != 31 || cells[2] != 4;
  bad += out[1] != high || out[2] != low || out[3] != 64 || out[4] != -1 || out[5] == 0 || out[6] != 1;
  atomicAdd(out, bad);
}

}  // namespace
