// One thread of a warp, for what one thread does (elect.sync, sm_90 and later).
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/chip_features.cuh"

namespace clusterfusion::device {

// Whether this thread is the one; for whole warps. Unlike a test for lane 0 it tells the compiler
// that a single thread runs what depends on it: addresses and counts stay in uniform registers,
// where bulk copies want them.
__device__ __forceinline__ bool elect_one() {
  if constexpr (!kBulkCopies) {
    return threadIdx.x % 32 == 0;
  } else {
    std::uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred one;\n"
        "elect.sync _|one, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, one;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
  }
}

}  // namespace clusterfusion::device
