#include "backend/cuda/driver_function.hpp"

#include <cuda_runtime_api.h>

#include "backend/cuda/check.hpp"
#include "backend/cuda/relaxed_capture.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

void* find_driver_function(const char* name) {
  constexpr unsigned kVersion = 12000;
  const RelaxedCapture relaxed;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  check(cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &status),
        "looking for a function of the driver");
  require(status == cudaDriverEntryPointSuccess, ErrorKind::unsupported,
          "the NVIDIA driver has no {}; install a driver for CUDA 12 or later", name);
  return function;
}

}  // namespace clusterfusion::cuda
