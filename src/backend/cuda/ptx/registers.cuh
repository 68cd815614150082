// Moving registers between warpgroups (setmaxnreg). Does nothing but on sm_90a: ptxas ignores it
// for sm_120a in kernels that call a function, and says so each time.
//
// Takes effect for whole warpgroups (4 warps, aligned) of a kernel whose register count is capped
// at entry by __launch_bounds__(threads, 1). Counts are multiples of 8 from 24 to 256.
#pragma once

namespace clusterfusion::device {

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace clusterfusion::device
