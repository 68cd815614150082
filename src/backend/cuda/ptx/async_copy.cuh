// Asynchronous copies of 16 bytes from global to shared memory (cp.async, sm_80 and later).
#pragma once

#include <cstdint>

namespace clusterfusion::device {

__device__ __forceinline__ void copy_16(std::uint32_t shared_address, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address), "l"(global)
               : "memory");
}
// Copies 16 bytes, or writes 16 zero bytes and reads nothing if not `valid`.
__device__ __forceinline__ void copy_16_or_zero(std::uint32_t shared_address, const void* global,
                                                bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that this thread has started and that are in none yet.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the last `kGroups`.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Waits for all copies that this thread has started. A block's threads see each other's copies
// behind the barrier that follows.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace clusterfusion::device
