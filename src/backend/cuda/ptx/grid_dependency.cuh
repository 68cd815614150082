// Programmatic dependent launch (PTX ISA, "griddepcontrol"; sm_90 and later): a grid that is
// launched for it may become resident while the grid before it in the stream still runs. Without it
// both instructions do nothing.
#pragma once

#include "backend/cuda/ptx/chip_features.cuh"

namespace clusterfusion::device {

// Grids that depend on this one may be made resident from now on, where there is room.
__device__ __forceinline__ void start_dependents() {
  if constexpr (kBulkCopies) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the grids that this one depends on have ended and their results are visible.
__device__ __forceinline__ void wait_for_dependencies() {
  if constexpr (kBulkCopies) asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace clusterfusion::device
