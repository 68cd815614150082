// Scratch memory of the layer calls. Launches that may run at the same time must not share it, so
// each stream has its own, and so has each capture of a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/cuda/ops/layer_params.hpp"

namespace clusterfusion::cuda {

struct LayerScratchView {
  std::uint32_t* started;  // see LayerParams
  char* lamport;           // two sets of `lamport_bytes`
  std::uint32_t* tickets;  // [2, kLayerCounters]
  void* between;           // `between_bytes` for what two launches hand over
};

// The scratch for launches on `stream` of `device`, the current one, with these sizes. Made at the
// first call with them (then it waits for the memory to be cleared, on a stream of its own), also
// while `stream` is captured; kept until the process ends. May be called from several threads.
// Errors: out_of_memory.
LayerScratchView layer_scratch(int device, cudaStream_t stream, std::int64_t lamport_bytes,
                               std::int64_t between_bytes);

}  // namespace clusterfusion::cuda
