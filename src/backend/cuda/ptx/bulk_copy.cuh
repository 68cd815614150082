// Bulk asynchronous copies from global to shared memory (cp.async.bulk, sm_90 and later).
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/mbarrier.cuh"

namespace clusterfusion::device {

// Copies `bytes` and lets `barrier` know. Both addresses and the size are multiples of 16. Target
// and barrier are addresses in shared memory, or pointers.
__device__ __forceinline__ void bulk_copy_to_shared(std::uint32_t target, const void* global,
                                                    std::uint32_t bytes, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(target),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void bulk_copy_to_shared(void* target, const void* global,
                                                    std::uint32_t bytes, std::uint64_t* barrier) {
  bulk_copy_to_shared(shared_address(target), global, bytes, shared_address(barrier));
}

// The same with a policy of l2_policy().
__device__ __forceinline__ void bulk_copy_to_shared(std::uint32_t target, const void* global,
                                                    std::uint32_t bytes, std::uint32_t barrier,
                                                    std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings `bytes` into L2, where they stay coherent: also data that somebody may still write.
// Address and size are multiples of 16.
__device__ __forceinline__ void bulk_prefetch(const void* global, std::uint32_t bytes) {
  if constexpr (kBulkCopies) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
  } else {
    constexpr std::uint32_t kLine = 128;
    for (std::uint32_t at = 0; at < bytes; at += kLine)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(global) + at));
  }
}

// Orders this thread's ordinary accesses to shared and global memory before later bulk copies of
// the threads it synchronises with (the copy engine is another proxy). Copies by cp.async need
// none.
__device__ __forceinline__ void fence_before_bulk_copy() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async;" ::: "memory");
}
// The same for accesses to shared memory alone.
__device__ __forceinline__ void fence_shared_before_bulk_copy() {
  if constexpr (kBulkCopies) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace clusterfusion::device
