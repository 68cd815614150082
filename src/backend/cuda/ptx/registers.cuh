// Moving registers between warpgroups (setmaxnreg). Does nothing but on sm_90a: ptxas ignores it
// for sm_120a in kernels that call a function, and says so each time.
//
// Takes effect for whole warpgroups (4 warps, aligned) of a kernel whose register count is capped
// at entry by __launch_bounds__(threads, 1). Counts are multiples of 8 from 24 to 256.
#pragma once

#include "backend/cuda/ptx/chip_features.cuh"

namespace clusterfusion::device {

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  if constexpr (kWarpgroups) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  if constexpr (kWarpgroups) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace clusterfusion::device
