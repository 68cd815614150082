// Moving registers between warpgroups (setmaxnreg, sm_90a and sm_120a).
//
// Takes effect for whole warpgroups (4 warps, aligned) of a kernel whose register count is capped
// at entry by __launch_bounds__(threads, 1). Counts are multiples of 8 from 24 to 256.
#pragma once

namespace clusterfusion::device {

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace clusterfusion::device
