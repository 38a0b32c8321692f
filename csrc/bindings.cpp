// Python's door to the kernels, the only file that includes pybind11. Tensors cross it as addresses, strides and sizes;
// no torch header is needed, so the module does not depend on torch's ABI and builds in seconds.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "accept.h"
#include "build_tree.h"
#include "compact_kv.h"
#include "decide_exit.h"
#include "device.h"
#include "sample_targets.h"
#include "tree.h"
#include "verify_tree.h"

namespace py = pybind11;

// A strided tensor is a tuple in Python: (address, stride of each axis).
namespace pybind11::detail {

template <typename View, size_t AXES>
struct view_caster {
  PYBIND11_TYPE_CASTER(View, const_name("tuple[int, ...]"));

  bool load(handle source, bool convert) {
    make_caster<std::array<int64_t, AXES + 1>> caster;
    if (!caster.load(source, convert)) return false;
    const auto& numbers = cast_op<std::array<int64_t, AXES + 1>&>(caster);
    value.data = reinterpret_cast<decltype(value.data)>(numbers[0]);
    static_assert(sizeof(View) == (AXES + 1) * sizeof(int64_t));
    std::memcpy(reinterpret_cast<char*>(&value) + sizeof(int64_t), &numbers[1], AXES * sizeof(int64_t));
    return true;
  }
};

template <typename T>
struct type_caster<specexit::Vector<T>> : view_caster<specexit::Vector<T>, 1> {};
template <typename T>
struct type_caster<specexit::Matrix<T>> : view_caster<specexit::Matrix<T>, 2> {};
template <typename T>
struct type_caster<specexit::Cube<T>> : view_caster<specexit::Cube<T>, 3> {};

}  // namespace pybind11::detail

namespace {

using namespace specexit;
using Address = std::uintptr_t;
using Ints = Vector<const int32_t>;
using IntRows = Matrix<const int32_t>;
using Floats = Vector<const float>;

// Raises RuntimeError for a failed call. Reading the error also clears it: otherwise it would be reported again by
// the next, innocent launch.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// (number of devices, why it is 0 or ""): a missing driver is an answer here, not an error.
py::tuple count_devices() {
  int count = 0;
  const cudaError_t error = device_count(&count);
  cudaGetLastError();
  return py::make_tuple(count, error == cudaSuccess ? "" : cudaGetErrorString(error));
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

// An answer about the current device.
template <cudaError_t (*ask)(int*)>
int answer(const char* what) {
  int value = 0;
  check(ask(&value), what);
  return value;
}

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

// A struct of addresses from their list.
template <typename Struct, size_t FIELDS>
Struct from_addresses(const std::array<Address, FIELDS>& addresses) {
  static_assert(sizeof(Struct) >= sizeof(addresses));
  Struct result = {};
  std::memcpy(static_cast<void*>(&result), addresses.data(), sizeof(addresses));
  return result;
}

using StateFields = std::array<Address, STATE_FIELDS>;
using RuleFields = std::array<Address, RULE_TENSORS>;

void run_build_tree(Ints root, IntRows tokens, Matrix<const float> scores, IntRows parents, IntRows forced,
                    Ints n_forced, int batch, int candidates, int n_ids, int nodes, Address node_tokens,
                    Address parent, Address depth, Address visible, Address stream) {
  const BuildTree arguments = {root,       tokens,
                               scores,     parents,
                               forced,     n_forced,
                               batch,      candidates,
                               n_ids,      nodes,
                               pointer<int32_t>(node_tokens), pointer<int32_t>(parent),
                               pointer<int32_t>(depth),       pointer<int64_t>(visible)};
  check(build_tree(arguments, stream_of(stream)), "build_tree");
}

void run_sample_targets(Address logits, int64_t stride_row, int dtype, Ints positions, Vector<const int64_t> seeds,
                        Floats temperature, Ints top_k, Floats top_p, Floats min_p, int rows, int vocabulary,
                        Address best, Address mass, Address targets, Address stream) {
  const SampleTargets arguments = {pointer<void>(logits), stride_row, static_cast<Float>(dtype),
                                   positions, seeds, temperature, top_k, top_p, min_p, rows, vocabulary,
                                   pointer<uint64_t>(best), pointer<uint64_t>(mass), pointer<int32_t>(targets)};
  check(sample_targets(arguments, stream_of(stream)), "sample_targets");
}

void run_verify_tree(IntRows tokens, IntRows parent, Cube<const int64_t> visible, IntRows targets, int batch, int nodes,
                     int columns, Address path, Address n_accepted, Address stream) {
  const VerifyTree arguments = {tokens, parent, visible, targets, batch, nodes, columns,
                                pointer<int32_t>(path), pointer<int32_t>(n_accepted)};
  check(verify_tree(arguments, stream_of(stream)), "verify_tree");
}

void run_accept(IntRows tokens, IntRows parent, IntRows depth, Cube<const int64_t> visible, IntRows targets,
                Ints stop_ids, const StateFields& state, int batch, int nodes, int columns, int n_stop_ids, int n_ids,
                Address path, Address n_accepted, Address next_token, Address stream) {
  const Accept arguments = {tokens, parent, depth, visible, targets, stop_ids, from_addresses<State>(state),
                            batch, nodes, columns, n_stop_ids, n_ids,
                            pointer<int32_t>(path), pointer<int32_t>(n_accepted), pointer<int32_t>(next_token)};
  check(accept(arguments, stream_of(stream)), "accept");
}

// rule_sizes  vocabulary, start ids, end ids, forced ids
// options     smoothing, per_step, has_minimum, has_budget, force_stops
void run_decide_exit(Cube<const float> signals, const RuleFields& rules, const std::array<int, 4>& rule_sizes,
                     const std::array<int, 5>& options, const StateFields& state, int batch, int columns, int n_signals,
                     int n_ids, int tail, int window, bool has_trace, Address cut, Address stream) {
  DecideExit arguments = {signals, from_addresses<ExitRules>(rules), from_addresses<State>(state), batch, columns,
                          n_signals, n_ids, tail, window, has_trace, pointer<int32_t>(cut)};
  ExitRules& r = arguments.rules;
  r.vocabulary = rule_sizes[0], r.n_start = rule_sizes[1], r.n_end = rule_sizes[2], r.n_force = rule_sizes[3];
  r.smoothing = options[0], r.per_step = options[1], r.has_minimum = options[2], r.has_budget = options[3];
  r.force_stops = options[4];
  check(decide_exit(arguments, stream_of(stream)), "decide_exit");
}

// Caches of one shape: what CacheShape has, in its order, and their addresses.
using CacheGroup = std::tuple<std::array<int64_t, 7>, std::vector<Address>>;

void run_compact_kv(const std::vector<CacheGroup>& groups, int vector, IntRows path, Ints n_accepted, Ints lengths,
                    IntRows block_table, bool is_paged, int batch, int columns, int table_blocks, Address stream) {
  CompactKv arguments = {};
  arguments.path = path, arguments.n_accepted = n_accepted, arguments.lengths = lengths;
  arguments.block_table = block_table, arguments.is_paged = is_paged, arguments.table_blocks = table_blocks;
  arguments.batch = batch, arguments.columns = columns, arguments.vector = vector;
  int shapes = 0;
  const auto flush = [&] {
    if (arguments.tensors > 0) check(compact_kv(arguments, stream_of(stream)), "compact_kv");
    arguments.tensors = shapes = 0;
  };
  for (const auto& [numbers, addresses] : groups) {  // one launch takes them all, unless there are very many
    const CacheShape shape = {numbers[0], numbers[1], numbers[2], static_cast<int>(numbers[3]),
                              static_cast<int>(numbers[4]), static_cast<int>(numbers[5]), static_cast<int>(numbers[6])};
    if (shapes == MAX_SHAPES) flush();
    arguments.shapes[shapes++] = shape;
    for (const Address address : addresses) {
      if (arguments.tensors == MAX_TENSORS) {
        flush();
        arguments.shapes[shapes++] = shape;
      }
      arguments.caches[arguments.tensors] = pointer<void>(address);
      arguments.shape_of[arguments.tensors++] = static_cast<uint8_t>(shapes - 1);
    }
  }
  flush();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of specexit_kernels; specexit_kernels.native is its typed door.";
  m.attr("version") = SPECEXIT_VERSION;
  m.attr("architectures") = SPECEXIT_ARCHITECTURES;
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("driver_version", &driver_version);
  m.def("device_count", &count_devices);
  m.def("current_device", [] { return answer<current_device>("current_device"); });
  m.def("selected_architecture", [] { return answer<selected_architecture>("selected_architecture"); });

  m.attr("max_nodes") = MAX_NODES;
  m.attr("max_candidates") = MAX_CANDIDATES;
  m.attr("max_columns") = MAX_COLUMNS;
  m.attr("max_vocabulary") = MAX_VOCABULARY;
  m.attr("tile") = TILE;
  m.def("build_tree", &run_build_tree);
  m.def("sample_targets", &run_sample_targets);
  m.def("verify_tree", &run_verify_tree);
  m.def("accept", &run_accept);
  m.def("decide_exit", &run_decide_exit);
  m.def("compact_kv", &run_compact_kv);
}
