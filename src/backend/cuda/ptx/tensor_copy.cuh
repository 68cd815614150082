// Bulk copies of boxes of a tensor from global to shared memory (cp.async.bulk.tensor, sm_90 and
// later).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace clusterfusion::device {

// Copies the box at (column, row) of a tensor of two dimensions, as its map says; what lies outside
// arrives as zeros, and counts. `target` (a multiple of 128) and `barrier` are addresses in
// shared memory. The map lies in parameters of the kernel, or in constant memory.
__device__ __forceinline__ void tensor_copy_to_shared(std::uint32_t target, const CUtensorMap& map,
                                                      int column, int row, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to the same place in every block of the cluster that `blocks` has a bit for, and to each
// one's barrier.
__device__ __forceinline__ void tensor_copy_to_blocks(std::uint32_t target, const CUtensorMap& map,
                                                      int column, int row, std::uint32_t barrier,
                                                      std::uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// The same of a tensor of three dimensions.
__device__ __forceinline__ void tensor_copy_to_shared(std::uint32_t target, const CUtensorMap& map,
                                                      int column, int row, int layer,
                                                      std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(layer), "r"(barrier)
      : "memory");
}

// The same of a tensor of four dimensions, at `at`, the innermost first.
__device__ __forceinline__ void tensor_copy_to_shared(std::uint32_t target, const CUtensorMap& map,
                                                      int4 at, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(target),
      "l"(&map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(barrier)
      : "memory");
}

}  // namespace clusterfusion::device
