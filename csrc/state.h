// The state of a decode step: specexit_kernels/state.py describes it.
#pragma once

#include <cstdint>

namespace specexit {

// The fields of DecodeState in its order, contiguous. N stands for D + 1.
struct State {
  int32_t* lengths;          // [B]
  int32_t* limits;           // [B]
  int32_t* prompt_lengths;   // [B]
  int32_t* root;             // [B]
  int32_t* finished;         // [B] Finish
  int32_t* forced;           // [B, F]
  int32_t* n_forced;         // [B]
  int32_t* run;              // [B, N + 1]
  int32_t* n_pending;        // [B]
  int32_t* thinking;         // [B]
  int32_t* thinking_tokens;  // [B]
  int32_t* tail;             // [B, M]
  float* smoothed;           // [B, S]
  int32_t* seen;             // [B, S]
  float* history;            // [B, S, w]
  int32_t* exit_position;    // [B]
  int32_t* exit_reason;      // [B] ExitReason
  int32_t* output;           // [B, N]
  int32_t* n_output;         // [B]
  float* trace;              // [B, N or 0, 2, S]
};

constexpr int STATE_FIELDS = 20;
static_assert(sizeof(State) == STATE_FIELDS * sizeof(void*), "bindings.cpp fills it from a list of addresses");

enum Finish : int { RUNNING = 0, STOP = 1, LENGTH = 2 };
enum ExitReason : int { NO_EXIT = 0, BY_SIGNALS = 1, BY_BUDGET = 2 };
enum Smoothing : int { NONE = 0, EWMA = 1, WINDOW = 2, MOMENTUM = 3 };

}  // namespace specexit
