// Functions of the NVIDIA driver, found when they are needed: no program is linked with libcuda, so
// that it starts on machines without a driver too.
#pragma once

namespace clusterfusion::cuda {

// The driver's function of this name, as CUDA 12.0 has it. May be called while a stream is
// captured. Errors: unsupported if the driver has none.
void* find_driver_function(const char* name);

template <typename Function>
Function* driver_function(const char* name) {
  return reinterpret_cast<Function*>(find_driver_function(name));
}

}  // namespace clusterfusion::cuda
