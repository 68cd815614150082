// Programmatic dependent launch from the host's side: ptx/grid_dependency.cuh is the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace clusterfusion::cuda {

// How to launch a kernel whose blocks may become resident while the kernel before it in the stream
// still ends. That kernel's results are there only after device::wait_for_dependencies(), which
// every thread calls before it touches memory that earlier kernels read or write.
class DependentLaunch {
 public:
  DependentLaunch(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream) {
    attribute_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute_.val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  DependentLaunch(const DependentLaunch&) = delete;
  DependentLaunch& operator=(const DependentLaunch&) = delete;

  const cudaLaunchConfig_t* config() const noexcept { return &config_; }

 private:
  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

}  // namespace clusterfusion::cuda
