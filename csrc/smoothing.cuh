// The smoothing of one signal, value by value: specexit_kernels/smoothing.py says what it means.
#pragma once

#include <cuda_runtime.h>

#include "decide_exit.h"

namespace specexit {
namespace {

// What one lane knows of its signal. Values are taken in the order of the text, one at a time, so that no cut of the text
// into steps changes a value.
class Smoother {
 public:
  // `fresh` has room for the run's values; `history` is [w], newest last.
  __device__ Smoother(int kind, int window, float alpha, float smoothed, int seen, const float* history, float* fresh)
      : e(smoothed), seen(seen), kind(kind), window(window), alpha(alpha), history(history), fresh(fresh) {}

  float e;   // NaN while too few values were seen
  int seen;  // how many values went into it

  __device__ int needed() const { return kind == MOMENTUM ? window : 1; }

  // What follows starts afresh.
  __device__ void restart() { seen = 0; }

  __device__ void take(float x) {
    seen++;
    fresh[n_fresh++] = x;
    if (kind == NONE || (kind == EWMA && seen == 1)) e = x;
    else if (kind == EWMA) e = interpolate(e, x, alpha);
    else if (kind == WINDOW) e = mean();
    else e = seen < window ? NAN : __fadd_rn(x, __fdiv_rn(x - value(window - 1), window - 1));
  }

  // The last w values, 0 before the first one of those that were seen.
  __device__ void write_history(float* out) const {
    for (int i = 0; i < window; i++) out[i] = window - 1 - i < seen ? value(window - 1 - i) : 0.0f;
  }

 private:
  // torch.lerp's two forms, each with one rounding of the sum.
  __device__ static float interpolate(float from, float to, float weight) {
    const float change = __fsub_rn(to, from);
    return weight < 0.5f ? fmaf(weight, change, from) : fmaf(weight - 1.0f, change, to);
  }

  // The value `lag` before the newest. `write_history` may write what this reads: it reads at or beyond what it writes.
  __device__ float value(int lag) const {
    return lag < n_fresh ? fresh[n_fresh - 1 - lag] : history[window - 1 - lag + n_fresh];
  }

  __device__ float mean() const {
    const int count = seen < window ? seen : window;
    double sum = 0;  // in which the order of the addends does not show
    for (int lag = 0; lag < count; lag++) sum += value(lag);
    return static_cast<float>(sum / count);
  }

  int kind, window;
  float alpha;
  const float* history;
  float* fresh;
  int n_fresh = 0;
};

}  // namespace
}  // namespace specexit
