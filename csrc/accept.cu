// Acceptance, a warp a sequence: verify, stop at the first stop id, stop at the limit, commit.
//
// The root that the step began with, the forced ids and the counts of a row are read by all lanes and written by some: a
// __syncwarp stands between.
#include "accept.h"

#include "launch.h"
#include "verify_tree.cuh"

namespace specexit {
namespace {

__global__ void __launch_bounds__(WARP) accept_kernel(const Accept a) {
  const State& s = a.state;
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const Vector<const int32_t> targets = a.targets[row], depth = a.depth[row];
  int32_t* const forced = s.forced + row * a.n_ids;
  const int n_forced = s.n_forced[row];
  const int length = s.lengths[row], limit = s.limits[row], finished = s.finished[row], old_root = s.root[row];
  const auto target = [&](int node) {
    if (n_forced > 1) {  // the first one is the root
      const int after = depth[node] + 1;
      if (after > 0 && after < n_forced) return forced[min(after, a.n_ids - 1)];
    }
    return targets[node];
  };
  const Path path = longest_path(a.tokens[row], a.parent[row], a.visible[row], a.nodes, a.columns, target);

  unsigned first_stop = a.columns + 1;  // tokens up to it
  if (a.n_stop_ids > 0) {
    for (int n = lane; n < a.nodes; n += WARP) {
      const int index = path.index(n);
      if (index < 0) continue;
      const int emitted = target(n);
      for (int i = 0; i < a.n_stop_ids; i++)
        if (a.stop_ids[i] == emitted) first_stop = min(first_stop, index + 1u);
    }
    first_stop = __reduce_min_sync(ALL_LANES, first_stop);
  }

  // A finished row has no room, and none that it could fill: -1.
  const int room = finished ? -1 : max(limit - length - 1, 0);
  const int kept = max(min(min(path.length, room), static_cast<int>(first_stop)), 0);

  int32_t* const columns = a.path + row * a.columns;
  int32_t* const run = s.run + row * (a.columns + 1);
  __syncwarp();
  for (int n = lane; n < a.nodes; n += WARP) {
    const int index = path.index(n);
    if (index < 0 || index >= kept) continue;
    const int emitted = target(n);
    columns[index] = n;
    run[index + 1] = emitted;
    if (index == kept - 1) s.root[row] = a.next_token[row] = emitted;
  }
  for (int i = kept + lane; i < a.columns; i += WARP) {
    columns[i] = -1;
    run[i + 1] = 0;
  }

  // The forced ids move up; a chunk is read before it is written, and lies before all that is still to be read.
  const int left = max(n_forced - kept, 0);
  for (int first = 0; first < a.n_ids; first += WARP) {
    const int i = first + lane;
    const int id = i < left ? forced[min(i + kept, a.n_ids - 1)] : 0;
    __syncwarp();
    if (i < a.n_ids) forced[i] = id;
  }
  if (lane == 0) {
    run[0] = old_root;
    if (kept == 0) a.next_token[row] = old_root;
    a.n_accepted[row] = s.n_pending[row] = kept;
    s.lengths[row] = length + kept;
    s.n_forced[row] = left;
    if (kept == static_cast<int>(first_stop)) s.finished[row] = STOP;
    else if (kept == room) s.finished[row] = LENGTH;
  }
}

}  // namespace

cudaError_t accept(const Accept& arguments, cudaStream_t stream) {
  if (arguments.nodes < 1 || arguments.nodes > MAX_NODES) return cudaErrorInvalidValue;
  return launch(accept_kernel, arguments.batch, WARP, stream, arguments);
}

}  // namespace specexit
