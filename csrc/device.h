// What the CUDA runtime says of the devices and of the code that this module carries for them.
#pragma once

#include <cuda_runtime_api.h>

namespace specexit {

// Devices that the runtime can use; 0 with cudaErrorInsufficientDriver where no driver is installed.
cudaError_t device_count(int* count);

// Device that this module's launches would run on, from this thread.
cudaError_t current_device(int* device);

// Architecture of the code that the module runs on the current device, as 10 * major + minor: 90 for sm_90 and for
// sm_90a, the device's own where PTX was compiled for it at load time. cudaErrorNoKernelImageForDevice where the
// module was built for other devices only.
cudaError_t selected_architecture(int* architecture);

}  // namespace specexit
