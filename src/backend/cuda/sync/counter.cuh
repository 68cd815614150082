// Counters on which threads wait for each other: in global memory for blocks, in shared memory
// within one. They only grow within a launch, so none needs a reset while anybody may look at it.
// Blocks that wait for each other must all be resident together, or do each other's work.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/mbarrier.cuh"

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

// The same within a block, on a counter in shared memory that one thread writes. In a build for
// racecheck (CLUSTERFUSION_RACECHECK) both are atomic operations, which it does not take for a
// race.
__device__ __forceinline__ void block_counter_store(std::uint32_t* counter, std::uint32_t value) {
#ifdef CLUSTERFUSION_RACECHECK
  [[maybe_unused]] std::uint32_t before;
  asm volatile("atom.release.cta.shared::cta.exch.b32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(shared_address(counter)), "r"(value)
               : "memory");
#else
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(counter)), "r"(value)
               : "memory");
#endif
}

__device__ __forceinline__ std::uint32_t block_counter_load(std::uint32_t* counter) {
  std::uint32_t value;
#ifdef CLUSTERFUSION_RACECHECK
  asm volatile("atom.acquire.cta.shared::cta.add.u32 %0, [%1], 0;"
               : "=r"(value)
               : "r"(shared_address(counter))
               : "memory");
#else
  asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
               : "=r"(value)
               : "r"(shared_address(counter))
               : "memory");
#endif
  return value;
}

// For roles off the critical path: how long they sleep between two loads of a counter.
inline constexpr unsigned kBackoffNanoseconds = 100;

// Spins until the counter has reached `target`, asleep for `nanoseconds` between two loads.
__device__ __forceinline__ void block_counter_wait(std::uint32_t* counter, std::uint32_t target,
                                                   unsigned nanoseconds = 0) {
  while (static_cast<std::int32_t>(block_counter_load(counter) - target) < 0) {
    if (nanoseconds != 0) __nanosleep(nanoseconds);
  }
}

}  // namespace clusterfusion::device
