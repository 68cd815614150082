// Programmatic dependent launch from the host's side: ptx/grid_dependency.cuh is the other.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "backend/cuda/device_properties.hpp"

namespace clusterfusion::cuda {

// How to launch a kernel whose blocks may become resident while the kernel before it in the stream
// still ends. That kernel's results are there only after device::wait_for_dependencies(), which
// every thread calls before it touches memory that earlier kernels read or write. On GPUs that have
// neither such launches nor clusters, it is a launch like any other.
class DependentLaunch {
 public:
  // `cluster`: blocks of a cluster, next to each other in x.
  DependentLaunch(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                  unsigned cluster = 1) {
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {cluster, 1, 1};
    config_.gridDim = grid;
    config_.blockDim = block;
    config_.dynamicSmemBytes = shared_bytes;
    config_.stream = stream;
    config_.attrs = attributes_;
    config_.numAttrs = !has_bulk_copies() ? 0 : cluster > 1 ? 2 : 1;
  }
  DependentLaunch(const DependentLaunch&) = delete;
  DependentLaunch& operator=(const DependentLaunch&) = delete;

  const cudaLaunchConfig_t* config() const noexcept { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2]{};
  cudaLaunchConfig_t config_{};
};

}  // namespace clusterfusion::cuda
