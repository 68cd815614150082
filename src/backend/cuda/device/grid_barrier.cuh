// Counters in global memory on which blocks wait for each other. They only grow within a launch, so
// none needs a reset while anybody may look at it. All blocks must be resident together.
#pragma once

#include <cstdint>

namespace clusterfusion::device {

// Adds to a counter; what this thread (and those it synchronised with) wrote before is visible to
// whoever sees the new count.
__device__ __forceinline__ void counter_add_release(std::uint32_t* counter, std::uint32_t amount) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(amount) : "memory");
}

__device__ __forceinline__ std::uint32_t counter_load_acquire(const std::uint32_t* counter) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Spins until the counter has reached `target` (counts may wrap).
__device__ __forceinline__ void counter_wait(const std::uint32_t* counter, std::uint32_t target) {
  while (static_cast<std::int32_t>(counter_load_acquire(counter) - target) < 0) {
  }
}

}  // namespace clusterfusion::device
