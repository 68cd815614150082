// Asynchronous copies of 16 bytes from global to shared memory (cp.async, sm_80 and later).
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/mbarrier.cuh"

namespace clusterfusion::device {

__device__ __forceinline__ void copy_16(std::uint32_t shared_address, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address), "l"(global)
               : "memory");
}
// The same with a policy of l2_policy().
__device__ __forceinline__ void copy_16(std::uint32_t shared_address, const void* global,
                                        std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address),
               "l"(global), "l"(policy)
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

// Arrives at the mbarrier at `address` when all copies that this thread has started have landed:
// one of the arrivals that the barrier was initialised for.
__device__ __forceinline__ void mbarrier_arrive_behind_copies(std::uint32_t address) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address) : "memory");
}

// Copies `bytes`, a multiple of 16, by all lanes of a warp, with a policy of l2_policy(). Both
// addresses are multiples of 16.
__device__ __forceinline__ void copy_by_warp(std::uint32_t target, const void* global,
                                             std::uint32_t bytes, std::uint64_t policy) {
  const auto* source = static_cast<const char*>(global);
  // So many copies of a lane before the next look at how far it is.
  constexpr std::uint32_t kWarpBytes = 32 * 16, kUnroll = 8;
  std::uint32_t at = threadIdx.x % 32 * 16;
  for (; at + (kUnroll - 1) * kWarpBytes < bytes; at += kUnroll * kWarpBytes) {
#pragma unroll
    for (std::uint32_t i = 0; i < kUnroll; ++i)
      copy_16(target + at + i * kWarpBytes, source + at + i * kWarpBytes, policy);
  }
  for (; at < bytes; at += kWarpBytes) copy_16(target + at, source + at, policy);
}

}  // namespace clusterfusion::device
