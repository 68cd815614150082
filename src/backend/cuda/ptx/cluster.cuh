// Thread block clusters: their barrier, and each other's shared memory. Before sm_90, which has
// none, each block is one by itself.
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/chip_features.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"

namespace clusterfusion::device {

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank = 0;
  if constexpr (kBulkCopies) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks: what they wrote before, also to shared memory, is visible behind. A
// block must not end while another may look into its shared memory, so this comes last as well.
__device__ __forceinline__ void cluster_barrier() {
  if constexpr (kBulkCopies) {
    asm volatile(
        "barrier.cluster.arrive.release;\n\t"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
  } else {
    __syncthreads();
  }
}

// Where block `rank` of the cluster has what lies at `address` in this block's shared memory.
template <typename T>
__device__ __forceinline__ T* of_block(T* address, std::uint32_t rank) {
  if constexpr (kBulkCopies) {
    std::uint64_t mapped;
    asm volatile("mapa.u64 %0, %1, %2;"
                 : "=l"(mapped)
                 : "l"(reinterpret_cast<std::uint64_t>(address)), "r"(rank));
    return reinterpret_cast<T*>(mapped);
  } else {
    return address;
  }
}

// The same for an address in shared memory.
__device__ __forceinline__ std::uint32_t address_in_block(std::uint32_t address,
                                                          std::uint32_t rank) {
  std::uint32_t mapped = address;
  if constexpr (kBulkCopies)
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Arrives at the mbarrier at `address`, as address_in_block() gives it. It waits for nothing: what
// this thread has read must have come before (of wgmma, behind its wait), and of what it wrote to
// memory, other blocks of the cluster learn nothing (that would take a fence, and half a
// microsecond).
__device__ __forceinline__ void mbarrier_arrive_in_cluster(std::uint32_t address) {
  if constexpr (kBulkCopies)
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
  else
    mbarrier_arrive(address);
}

}  // namespace clusterfusion::device
