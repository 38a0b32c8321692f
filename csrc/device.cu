#include "device.h"

namespace specexit {
namespace {

// Never launched: the runtime picks the code of every kernel of a module alike, so this one's attributes stand for all.
__global__ void probe() {}

}  // namespace

cudaError_t device_count(int* count) {
  *count = 0;
  return cudaGetDeviceCount(count);
}

cudaError_t current_device(int* device) { return cudaGetDevice(device); }

cudaError_t selected_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) *architecture = attributes.binaryVersion;
  return error;
}

}  // namespace specexit
