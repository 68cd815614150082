// mbarrier: a barrier in shared memory that counts arrivals and bytes of bulk copies.
//
// A wait is by parity: it cannot tell phase k from phase k - 2. Whoever waits must therefore
// know otherwise that phase k - 1 is complete, at best because he has waited for it. PTX ISA,
// "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include <cstdint>

#include "backend/cuda/ptx/chip_features.cuh"

namespace clusterfusion::device {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// By one thread, before mbarrier_fence_init() and a block barrier.
__device__ __forceinline__ void mbarrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to bulk copies and to the rest of the cluster.
__device__ __forceinline__ void mbarrier_fence_init() {
  if constexpr (kBulkCopies) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Barriers may be given by their address in shared memory, where that is at hand.
__device__ __forceinline__ void mbarrier_arrive(std::uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(std::uint64_t* barrier) {
  mbarrier_arrive(shared_address(barrier));
}

// Arrives, and announces `bytes` that bulk copies will bring before the phase can complete.
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint32_t address, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(std::uint64_t* barrier,
                                                       std::uint32_t bytes) {
  mbarrier_arrive_expect(shared_address(barrier), bytes);
}

// Whether the phase of the given parity is complete. By parity, like the wait: see above.
__device__ __forceinline__ bool mbarrier_test(std::uint32_t address, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(done)
      : "r"(address), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of the given parity (0 for the first) is complete. Where waits cannot be
// suspended (try_wait, sm_90 and later), it looks again and again.
__device__ __forceinline__ void mbarrier_wait(std::uint32_t address, std::uint32_t parity) {
  if constexpr (!kBulkCopies) {
    while (!mbarrier_test(address, parity)) {
    }
  } else {
    std::uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred complete;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
          "selp.u32 %0, 1, 0, complete;\n"
          "}"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
    } while (!done);
  }
}
__device__ __forceinline__ void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
  mbarrier_wait(shared_address(barrier), parity);
}

}  // namespace clusterfusion::device
