// The op decide_exit: specexit_kernels/decide_exit.py says what it means.
#pragma once

#include "state.h"
#include "tensor.h"

namespace specexit {

constexpr int MAX_COLUMNS = 32;  // D + 1: a lane each
constexpr int MAX_SIGNALS = 3;

// The tensors of ExitRules in its order, contiguous, and its other fields.
struct ExitRules {
  const float* thresholds;      // [B, S]
  const uint8_t* used;          // [B, S]
  const float* alpha;           // [B]
  const int32_t* min_thinking;  // [B]
  const int32_t* budget;        // [B]
  const uint8_t* hard_budget;   // [B]
  const uint8_t* boundary;      // [V]
  const int32_t* start;         // [Fs]
  const int32_t* end;           // [Fe]
  const int32_t* force;         // [Ff]
  int vocabulary, n_start, n_end, n_force;
  int smoothing;
  bool per_step, has_minimum, has_budget, force_stops;
};

constexpr int RULE_TENSORS = 10;

struct DecideExit {
  Cube<const float> signals;  // [B, D + 1, S]; without data: all are missing
  ExitRules rules;
  State state;                             // changed
  int batch, columns, n_signals, n_ids;    // B, D + 1 up to MAX_COLUMNS, S up to MAX_SIGNALS, F
  int tail, window;                        // M, w
  bool has_trace;
  int32_t* cut;  // [B], out
};

cudaError_t decide_exit(const DecideExit& arguments, cudaStream_t stream);

}  // namespace specexit
