// Python's door to the kernels, the only file that includes pybind11. Tensors cross it as addresses, sizes and a
// stream; no torch header is needed, so the module does not depend on torch's ABI and builds in seconds.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace py = pybind11;

namespace {

// Raises RuntimeError for a failed call. Reading the error also clears it: otherwise it would be reported again by
// the next, innocent launch.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// (number of devices, why it is 0 or ""): a missing driver is an answer here, not an error.
py::tuple device_count() {
  int count = 0;
  const cudaError_t error = specexit::device_count(&count);
  cudaGetLastError();
  return py::make_tuple(count, error == cudaSuccess ? "" : cudaGetErrorString(error));
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "driver_version");
  return version;
}

int current_device() {
  int device = 0;
  check(specexit::current_device(&device), "current_device");
  return device;
}

int selected_architecture() {
  int architecture = 0;
  check(specexit::selected_architecture(&architecture), "selected_architecture");
  return architecture;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of specexit_kernels; specexit_kernels.native is its typed door.";
  m.attr("version") = SPECEXIT_VERSION;
  m.attr("architectures") = SPECEXIT_ARCHITECTURES;
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("driver_version", &driver_version);
  m.def("device_count", &device_count);
  m.def("current_device", &current_device);
  m.def("selected_architecture", &selected_architecture);
}
