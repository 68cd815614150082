// Tensor-core products on 16-bit operands with float32 accumulation (mma.sync, sm_80 and later).
//
// Lane = 4 g + q. In m16n8k16, lane (g, q) holds of operand A (16 x 16) the elements of rows g and
// g + 8 at k = 2q, 2q + 1, 2q + 8, 2q + 9, of operand B (16 x 8) those of column g at the same k,
// and of the result (16 x 8) rows g and g + 8 at columns 2q and 2q + 1. PTX ISA, "Matrix Fragments
// for mma.m16n8k16".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace clusterfusion::device {

template <typename T>
struct MmaInput;
template <>
struct MmaInput<__half> {
  static constexpr bool kIsHalf = true;
};
template <>
struct MmaInput<__nv_bfloat16> {
  static constexpr bool kIsHalf = false;
};

// result += A B for A 16 x 16 and B 16 x 8: `a` is {row g, row g + 8} at k = 2q, 2q + 1, then the
// same at k = 2q + 8, 2q + 9; `b_low` and `b_high` are column g at these k.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&result)[4], uint4 a, std::uint32_t b_low,
                                            std::uint32_t b_high) {
  if constexpr (MmaInput<T>::kIsHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_low), "r"(b_high));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(result[0]), "+f"(result[1]), "+f"(result[2]), "+f"(result[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b_low), "r"(b_high));
  }
}

// Four 8 x 8 blocks of 16-bit values: lanes 8 i to 8 i + 7 point at the rows (16 bytes each) of
// block i; lane (g, q) gets columns 2q, 2q + 1 of row g of each.
__device__ __forceinline__ uint4 load_matrix_4(std::uint32_t shared_row_address) {
  uint4 blocks;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks.x), "=r"(blocks.y), "=r"(blocks.z), "=r"(blocks.w)
               : "r"(shared_row_address)
               : "memory");
  return blocks;
}

// The same, transposed on the way: lane (g, q) gets rows 2q, 2q + 1 of column g of each.
__device__ __forceinline__ uint4 load_matrix_4_transposed(std::uint32_t shared_row_address) {
  uint4 blocks;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks.x), "=r"(blocks.y), "=r"(blocks.z), "=r"(blocks.w)
               : "r"(shared_row_address)
               : "memory");
  return blocks;
}

}  // namespace clusterfusion::device
