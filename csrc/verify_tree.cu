// Verification of token trees, a warp a sequence: verify_tree.cuh.
#include "verify_tree.h"

#include "launch.h"
#include "verify_tree.cuh"

namespace specexit {
namespace {

__global__ void __launch_bounds__(WARP) verify_tree_kernel(const VerifyTree t) {
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x;
  const Vector<const int32_t> targets = t.targets[row];
  const Path path = longest_path(t.tokens[row], t.parent[row], t.visible[row], t.nodes, t.columns,
                                 [&](int node) { return targets[node]; });
  int32_t* const columns = t.path + row * t.columns;
  for (int n = lane; n < t.nodes; n += WARP)
    if (const int index = path.index(n); index >= 0) columns[index] = n;
  for (int i = path.length + lane; i < t.columns; i += WARP) columns[i] = -1;
  if (lane == 0) t.n_accepted[row] = path.length;
}

}  // namespace

cudaError_t verify_tree(const VerifyTree& arguments, cudaStream_t stream) {
  if (arguments.nodes < 1 || arguments.nodes > MAX_NODES) return cudaErrorInvalidValue;
  return launch(verify_tree_kernel, arguments.batch, WARP, stream, arguments);
}

}  // namespace specexit
