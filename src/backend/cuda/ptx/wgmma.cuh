// Tensor-core products of a warpgroup (wgmma, sm_90a): 64 x kColumns results, operand A in
// registers or in shared memory, operand B in shared memory. PTX ISA, "Asynchronous Warpgroup Level
// Matrix Multiply-Accumulate Operation using wgmma.mma_async instruction".
//
// Warp w of the group has rows 16 w to 16 w + 15. Lane = 4 g + q holds A and the results' rows g
// and g + 8 of these as mma.sync's m16n8k16 has them (mma.cuh): the result's columns 8 j + 2 q and
// 8 j + 2 q + 1 are result[4 j] and [4 j + 1] of row g, [4 j + 2] and [4 j + 3] of row g + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/ptx/mma.cuh"

namespace clusterfusion::device {

// Operand B, 16 x columns: its core matrices, 8 columns of 8 elements (16 bytes) each and dense,
// lie `k_bytes` apart along k and side by side along the columns. No swizzle.
__device__ __forceinline__ std::uint64_t wgmma_operand(std::uint32_t shared_address, int k_bytes) {
  constexpr int kCoreMatrixBytes = 128;
  return static_cast<std::uint64_t>((shared_address & 0x3FFFF) >> 4) |
         static_cast<std::uint64_t>(k_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(kCoreMatrixBytes >> 4) << 32;
}

// Operand A or B in rows of 64 elements (128 bytes) along k, as a bulk copy of a box with
// CU_TENSOR_MAP_SWIZZLE_128B leaves them, from a multiple of 1,024 bytes on: in row r the 16 bytes
// `unit` lie at unit ^ (r % 8). The next 16 elements along k: kWgmmaStep further.
__device__ __forceinline__ std::uint64_t wgmma_swizzled_operand(std::uint32_t shared_address) {
  constexpr std::uint64_t kEightRowsBytes = 1024, kSwizzle128 = 1;
  return static_cast<std::uint64_t>((shared_address & 0x3FFFF) >> 4) | std::uint64_t{1} << 16 |
         kEightRowsBytes >> 4 << 32 | kSwizzle128 << 62;
}
inline constexpr std::uint64_t kWgmmaStep = 32 >> 4;

// Before the first product of a group, and after registers that products use were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all groups but the last `kBut`.
template <int kBut>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBut) : "memory");
}

// Behind wgmma_wait(): no use of the results comes before it.
template <int kCount>
__device__ __forceinline__ void wgmma_results(float (&result)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(result[i])::"memory");
}

#define CF_RESULTS_8(r, i)                                                                      \
  "+f"((r)[i]), "+f"((r)[(i) + 1]), "+f"((r)[(i) + 2]), "+f"((r)[(i) + 3]), "+f"((r)[(i) + 4]), \
      "+f"((r)[(i) + 5]), "+f"((r)[(i) + 6]), "+f"((r)[(i) + 7])
#define CF_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CF_NAMES_16 CF_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CF_NAMES_32                                                     \
  CF_NAMES_16                                                           \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define CF_NAMES_64                                                             \
  CF_NAMES_32                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "    \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
  "%61, %62, %63"
#define CF_NAMES_48 \
  CF_NAMES_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CF_NAMES_80 \
  CF_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define CF_RESULTS_32(r, i) \
  CF_RESULTS_8(r, i), CF_RESULTS_8(r, (i) + 8), CF_RESULTS_8(r, (i) + 16), CF_RESULTS_8(r, (i) + 24)
// `a0` to `b`: the names of the operands behind the results.
#define CF_WGMMA(columns, type, names, a0, a1, a2, a3, b, ...)                                   \
  asm volatile(                                                                                  \
      "{\n"                                                                                      \
      ".reg .pred accumulate;\n"                                                                 \
      "setp.eq.s32 accumulate, 0, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, {" a0 \
      ", " a1 ", " a2 ", " a3 "}, " b                                                            \
      ", accumulate, 1, 1, 0;\n"                                                                 \
      "}"                                                                                        \
      : __VA_ARGS__                                                                              \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(operand))
#define CF_WGMMA_TYPED(columns, names, a0, a1, a2, a3, b, ...)       \
  if constexpr (MmaInput<T>::kIsHalf)                                \
    CF_WGMMA(columns, "f16", names, a0, a1, a2, a3, b, __VA_ARGS__); \
  else                                                               \
    CF_WGMMA(columns, "bf16", names, a0, a1, a2, a3, b, __VA_ARGS__)

// result += A B for A 64 x 16 and B 16 x kColumns, asynchronously: until wgmma_wait() neither
// `result` nor `a` nor B may be touched. `a` as in mma_16x8x16, `operand` from wgmma_operand().
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma_64x16(float (&result)[kColumns / 2], const uint4& a,
                                            std::uint64_t operand) {
  static_assert(kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128);
  if constexpr (kColumns == 16) {
    CF_WGMMA_TYPED(16, CF_NAMES_8, "%8", "%9", "%10", "%11", "%12", CF_RESULTS_8(result, 0));
  } else if constexpr (kColumns == 32) {
    CF_WGMMA_TYPED(32, CF_NAMES_16, "%16", "%17", "%18", "%19", "%20", CF_RESULTS_8(result, 0),
                   CF_RESULTS_8(result, 8));
  } else if constexpr (kColumns == 64) {
    CF_WGMMA_TYPED(64, CF_NAMES_32, "%32", "%33", "%34", "%35", "%36", CF_RESULTS_8(result, 0),
                   CF_RESULTS_8(result, 8), CF_RESULTS_8(result, 16), CF_RESULTS_8(result, 24));
  } else {
    CF_WGMMA_TYPED(128, CF_NAMES_64, "%64", "%65", "%66", "%67", "%68", CF_RESULTS_8(result, 0),
                   CF_RESULTS_8(result, 8), CF_RESULTS_8(result, 16), CF_RESULTS_8(result, 24),
                   CF_RESULTS_8(result, 32), CF_RESULTS_8(result, 40), CF_RESULTS_8(result, 48),
                   CF_RESULTS_8(result, 56));
  }
}

// Both operands in shared memory; `a` and `b`: their names.
#define CF_WGMMA_SHARED(columns, type, names, a, b, ...)                                       \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred accumulate;\n"                                                               \
      "setp.eq.s32 accumulate, 0, 0;\n"                                                        \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, " a \
      ", " b                                                                                   \
      ", accumulate, 1, 1, 0, 0;\n"                                                            \
      "}"                                                                                      \
      : __VA_ARGS__                                                                            \
      : "l"(first), "l"(second))
#define CF_WGMMA_SHARED_TYPED(columns, names, a, b, ...)       \
  if constexpr (MmaInput<T>::kIsHalf)                          \
    CF_WGMMA_SHARED(columns, "f16", names, a, b, __VA_ARGS__); \
  else                                                         \
    CF_WGMMA_SHARED(columns, "bf16", names, a, b, __VA_ARGS__)

// The same with A in shared memory too: `first` is A and `second` B, both from
// wgmma_swizzled_operand().
template <typename T, int kColumns>
__device__ __forceinline__ void wgmma_64x16(float (&result)[kColumns / 2], std::uint64_t first,
                                            std::uint64_t second) {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 96 || kColumns == 128 ||
                kColumns == 160);
  if constexpr (kColumns == 32) {
    CF_WGMMA_SHARED_TYPED(32, CF_NAMES_16, "%16", "%17", CF_RESULTS_8(result, 0),
                          CF_RESULTS_8(result, 8));
  } else if constexpr (kColumns == 64) {
    CF_WGMMA_SHARED_TYPED(64, CF_NAMES_32, "%32", "%33", CF_RESULTS_32(result, 0));
  } else if constexpr (kColumns == 96) {
    CF_WGMMA_SHARED_TYPED(96, CF_NAMES_48, "%48", "%49", CF_RESULTS_32(result, 0),
                          CF_RESULTS_8(result, 32), CF_RESULTS_8(result, 40));
  } else if constexpr (kColumns == 128) {
    CF_WGMMA_SHARED_TYPED(128, CF_NAMES_64, "%64", "%65", CF_RESULTS_32(result, 0),
                          CF_RESULTS_32(result, 32));
  } else {
    CF_WGMMA_SHARED_TYPED(160, CF_NAMES_80, "%80", "%81", CF_RESULTS_32(result, 0),
                          CF_RESULTS_32(result, 32), CF_RESULTS_8(result, 64),
                          CF_RESULTS_8(result, 72));
  }
}

#undef CF_WGMMA_SHARED_TYPED
#undef CF_WGMMA_SHARED
#undef CF_RESULTS_32
#undef CF_NAMES_80
#undef CF_NAMES_48
#undef CF_WGMMA_TYPED
#undef CF_WGMMA
#undef CF_NAMES_64
#undef CF_NAMES_32
#undef CF_NAMES_16
#undef CF_NAMES_8
#undef CF_RESULTS_8

}  // namespace clusterfusion::device
