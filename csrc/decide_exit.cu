// The exit decision, a warp a sequence: lane r has row r of the run, lane s smooths signal s. What rows know of each other
// (markers, counts of thinking tokens, the first row that may be cut) goes by ballots.
//
// What all lanes read of the state is written after the last __syncwarp. A signal's part is one lane's alone, and of the
// tail a chunk is read before it is written.
#include "decide_exit.h"

#include "launch.h"
#include "reduce.cuh"
#include "smoothing.cuh"

namespace specexit {
namespace {

// Bits of the first n rows.
__device__ unsigned first_rows(int n) { return n < WARP ? (1u << n) - 1 : ALL_LANES; }

// Tokens of the run up to the first row of a set; `none` if it is empty.
__device__ int up_to_first(unsigned rows, int none) { return rows ? __ffs(rows) : none; }

// Whether the text up to row r of the run ends with the marker; `tail` are the M tokens before the run.
__device__ bool ends_with(const int32_t* marker, int n, const int32_t* run, int r, const int32_t* tail, int n_tail) {
  bool same = n > 0;
  for (int back = 0; back < n; back++) {
    const int at = r - back;
    same &= (at >= 0 ? run[at] : tail[n_tail + at]) == marker[n - 1 - back];
  }
  return same;
}

// Whether a row is inside the thinking text, from the markers at the rows before it: the last one decides, at one row the
// end.
__device__ bool is_inside(bool at_start, unsigned starts, unsigned ends, int n_rows) {
  const unsigned marks = (starts | ends) & first_rows(n_rows);
  return marks ? !(ends >> (31 - __clz(marks)) & 1) : at_start;
}

// The value of a raw signal, as specexit_kernels/signals.py has it.
__device__ float activate(float raw, int signal) {
  return signal == 2 ? expf(raw) : __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-raw)));
}

__device__ bool passes(float e, float threshold, int signal) {
  const float margin = e - threshold;
  return (signal == 2 ? -margin : margin) > 0.0f;
}

__global__ void __launch_bounds__(WARP) decide_exit_kernel(const DecideExit d) {
  __shared__ float x[MAX_SIGNALS][MAX_COLUMNS], e[MAX_SIGNALS][MAX_COLUMNS], fresh[MAX_SIGNALS][MAX_COLUMNS];
  const State& s = d.state;
  const ExitRules& rules = d.rules;
  const int64_t row = blockIdx.x;
  const int r = threadIdx.x, signals = d.n_signals, none = d.columns + 1;
  const int32_t* const run = s.run + row * (d.columns + 1);
  int32_t* const tail = s.tail + row * d.tail;

  // What depends on nothing is loaded before the first ballot, across which the compiler moves no load.
  const bool in_run = r < d.columns, has_signal = r < signals;
  const int64_t of_signal = row * signals + r;
  const int n_pending = max(0, min(s.n_pending[row], d.columns)), length = s.lengths[row] - n_pending;
  const int token = in_run ? run[r] : -1, next = in_run ? run[r + 1] : 0;
  const bool ends_paragraph = token >= 0 && token < rules.vocabulary && rules.boundary[token] != 0;
  float raw[MAX_SIGNALS];
#pragma unroll
  for (int i = 0; i < MAX_SIGNALS; i++)
    raw[i] = in_run && i < signals && d.signals.data ? d.signals[row][r][i] : NAN;
  const float smoothed = has_signal ? s.smoothed[of_signal] : 0.0f;
  const int seen = has_signal ? s.seen[of_signal] : 0;
  const float threshold = has_signal ? rules.thresholds[of_signal] : 0.0f, alpha = rules.alpha[row];
  const bool is_used = has_signal && rules.used[of_signal] != 0, thought = s.thinking[row] != 0;
  const int thinking_tokens = s.thinking_tokens[row], n_forced = s.n_forced[row], reason = s.exit_reason[row];
  const int prompt_length = s.prompt_lengths[row], limit = s.limits[row];
  const int minimum = rules.has_minimum ? rules.min_thinking[row] : 0, budget = rules.has_budget ? rules.budget[row] : 0;
  const bool anywhere = rules.has_budget && rules.hard_budget[row] != 0;
  const int first_id = rules.n_force > 0 ? rules.force[0] : 0;

  // Rows that are read and generated; those that count stand inside thinking before and after their token.
  const bool live = in_run && r < n_pending && r + 1 > prompt_length - length;
  const unsigned starts =
      __ballot_sync(ALL_LANES, live && ends_with(rules.start, rules.n_start, run, r, tail, d.tail));
  const unsigned ends = __ballot_sync(ALL_LANES, live && ends_with(rules.end, rules.n_end, run, r, tail, d.tail));
  const bool before = is_inside(thought, starts, ends, r), after = is_inside(thought, starts, ends, r + 1);
  const bool thinks = is_inside(thought, starts, ends, d.columns);
  const bool counts = live && before && after;
  const unsigned counting = __ballot_sync(ALL_LANES, counts), inside = __ballot_sync(ALL_LANES, after);
  const bool stays = !__any_sync(ALL_LANES, before && !after);
  const bool at_boundary = counts && ends_paragraph;
  const unsigned boundaries = __ballot_sync(ALL_LANES, at_boundary);
  const int total = thinking_tokens + __popc(counting & first_rows(r + 1));

  unsigned present[MAX_SIGNALS];  // rows at which the signal has a value
#pragma unroll
  for (int i = 0; i < MAX_SIGNALS; i++) {
    x[i][r] = activate(raw[i], i);
    present[i] = __ballot_sync(ALL_LANES, counts && x[i][r] < INFINITY);  // NaN is not
  }
  __syncwarp();

  // Lane i smooths signal i, and finds the rows that it allows to be cut; a signal that is not used allows all.
  Smoother smoother(rules.smoothing, d.window, alpha, smoothed, seen, s.history + of_signal * d.window,
                    fresh[has_signal ? r : 0]);
  unsigned allowed = ALL_LANES;
  if (has_signal) {
    const unsigned mine = r == 0 ? present[0] : r == 1 ? present[1] : present[2];
    unsigned passed = 0;
    if (rules.per_step) {  // what was known before this step decides; then the mean of its values is taken
      const float known = smoother.seen < smoother.needed() ? NAN : smoother.e;
      passed = passes(known, threshold, r) ? ALL_LANES : 0;
      double sum = 0;
      for (int i = 0; i < d.columns; i++) {
        e[r][i] = known;
        if (mine >> i & 1) sum += x[r][i];
      }
      if (!stays) smoother.restart();
      else if (mine) smoother.take(static_cast<float>(sum / __popc(mine)));
    } else {
      for (int i = 0; i < d.columns; i++) {
        if (!(inside >> i & 1) && rules.n_start + rules.n_end > 0) smoother.restart();
        if (!(mine >> i & 1)) continue;
        smoother.take(x[r][i]);
        e[r][i] = smoother.e;
        if (passes(smoother.e, threshold, r)) passed |= 1u << i;
      }
    }
    if (is_used) allowed = passed;
  }
  __syncwarp();  // the trace reads all of e

  // The first row that the signals or the budget allow to be cut.
  unsigned fires = __reduce_and_sync(ALL_LANES, allowed) & (signals > 0 ? boundaries : 0);
  if (rules.per_step) fires = stays ? fires & (boundaries & -boundaries) : 0;
  if (rules.has_minimum) fires &= __ballot_sync(ALL_LANES, total >= minimum);
  unsigned spent = 0;
  if (rules.has_budget)
    spent = __ballot_sync(ALL_LANES, counts && (at_boundary || anywhere) && total >= budget);
  const int by_signals = up_to_first(fires, none), by_budget = up_to_first(spent, none);
  const int first = min(by_signals, by_budget);
  const bool is_cut = rules.n_force > 0 && first <= n_pending && n_forced == 0;
  const int end = is_cut ? first : 0, n_output = is_cut ? first : n_pending;
  if (in_run) s.output[row * d.columns + r] = r + 1 == end ? first_id : r < n_output ? next : 0;
  if (d.has_trace && in_run) {
#pragma unroll
    for (int i = 0; i < MAX_SIGNALS; i++) {
      if (i >= signals) break;
      const bool shown = r < n_output && present[i] >> r & 1;
      float* const at = s.trace + (row * d.columns + r) * 2 * signals + i;
      at[0] = shown ? x[i][r] : NAN;
      at[signals] = shown ? e[i][r] : NAN;
    }
  }
  if (has_signal) {
    if (is_cut) smoother.restart();
    s.seen[of_signal] = smoother.seen;
    s.smoothed[of_signal] = smoother.seen < smoother.needed() ? 0.0f : smoother.e;
    smoother.write_history(s.history + of_signal * d.window);
  }
  for (int at = 0; at < d.tail; at += WARP) {  // what a chunk writes is not read again
    const int i = at + r, from = i + n_output;
    int id = -1;
    if (i < d.tail && !is_cut) id = from < d.tail ? tail[from] : run[from - d.tail];
    __syncwarp();
    if (i < d.tail) tail[i] = id;
  }
  __syncwarp();
  for (int i = r; is_cut && i < rules.n_force; i += WARP) s.forced[row * d.n_ids + i] = rules.force[i];
  if (r != 0) return;
  d.cut[row] = end - 1;
  s.lengths[row] = length + n_output;
  s.n_output[row] = n_output;
  s.thinking[row] = thinks && !is_cut;
  s.thinking_tokens[row] = thinking_tokens + __popc(counting & first_rows(n_output));
  if (!is_cut) return;
  s.root[row] = first_id;
  s.n_forced[row] = rules.n_force;
  s.finished[row] = rules.force_stops ? STOP : limit - (length + end) == 1 ? LENGTH : RUNNING;
  if (reason == NO_EXIT) {
    s.exit_position[row] = length + end - 1;
    s.exit_reason[row] = by_budget < by_signals ? BY_BUDGET : BY_SIGNALS;
  }
}

}  // namespace

cudaError_t decide_exit(const DecideExit& arguments, cudaStream_t stream) {
  if (arguments.columns < 1 || arguments.columns > MAX_COLUMNS || arguments.n_signals > MAX_SIGNALS)
    return cudaErrorInvalidValue;
  return launch(decide_exit_kernel, arguments.batch, WARP, stream, arguments);
}

}  // namespace specexit
