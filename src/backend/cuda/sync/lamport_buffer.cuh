// Lamport buffers: results in global memory that carry their own readiness.
//
// An element whose bits are all ones is not ready: the sentinel. (As a float that is a NaN which no
// arithmetic yields; a store turns it into another NaN.) Readers load what they need and repeat the
// loads of elements that are not ready, so a result crosses from one SM to another in one store and
// one load, without a barrier, a fence or a flag. Before a buffer is used again it must be cleared
// (filled with the sentinel) when nobody reads it any more, and every writer and reader must know
// that it is clear.
#pragma once

#include <cstdint>
#include <cstring>

namespace clusterfusion::device {

inline constexpr std::uint32_t kNotReady = 0xffffffffu;

__device__ __forceinline__ void lamport_store(float* element, float value) {
  std::uint32_t bits = __float_as_uint(value);
  if (bits == kNotReady) bits = 0x7fffffffu;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(element), "r"(bits) : "memory");
}

// A 16-bit float of either type.
template <typename T>
__device__ __forceinline__ void lamport_store(T* element, T value) {
  static_assert(sizeof(T) == 2);
  std::uint16_t bits;
  std::memcpy(&bits, &value, 2);
  if (bits == 0xffffu) bits = 0x7fffu;
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(element), "h"(bits) : "memory");
}

// Two of them, the first in the low half.
__device__ __forceinline__ void lamport_store_pair(std::uint32_t* elements, std::uint32_t pair) {
  if ((pair & 0xffffu) == 0xffffu) pair ^= 0x8000u;
  if (pair >> 16 == 0xffffu) pair ^= 0x80000000u;
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(elements), "r"(pair) : "memory");
}

// The value must not be all ones.
__device__ __forceinline__ void lamport_store(std::uint64_t* element, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(element), "l"(value) : "memory");
}

// Loads, from L2: another SM may have written.
__device__ __forceinline__ std::uint32_t lamport_load(const float* element) {
  std::uint32_t bits;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(element) : "memory");
  return bits;
}
__device__ __forceinline__ std::uint64_t lamport_load(const std::uint64_t* element) {
  std::uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(bits) : "l"(element) : "memory");
  return bits;
}
__device__ __forceinline__ uint2 lamport_load_2(const void* elements) {
  uint2 bits;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(bits.x), "=r"(bits.y)
               : "l"(elements)
               : "memory");
  return bits;
}
__device__ __forceinline__ uint4 lamport_load_4(const void* elements) {
  uint4 bits;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(elements)
               : "memory");
  return bits;
}

// Predicated: leaves `to` as it is if `is_there` is false.
__device__ __forceinline__ void lamport_load_4_if(uint4& to, const void* elements, bool is_there) {
  asm volatile(
      "{\n"
      ".reg .pred predicate;\n"
      "setp.ne.s32 predicate, %5, 0;\n"
      "@predicate ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
      : "l"(elements), "r"(static_cast<int>(is_there))
      : "memory");
}

__device__ __forceinline__ bool any_not_ready(const uint2& elements) {
  return elements.x == kNotReady || elements.y == kNotReady;
}
__device__ __forceinline__ bool any_not_ready(const uint4& elements) {
  return elements.x == kNotReady || elements.y == kNotReady || elements.z == kNotReady ||
         elements.w == kNotReady;
}

// Whether a half of a word is not ready: as "has a zero half" of its complement.
__device__ __forceinline__ std::uint32_t half_not_ready(std::uint32_t word) {
  return (~word - 0x00010001u) & word & 0x80008000u;
}
__device__ __forceinline__ bool any_half_not_ready(const uint4& words) {
  return (half_not_ready(words.x) | half_not_ready(words.y) | half_not_ready(words.z) |
          half_not_ready(words.w)) != 0;
}
// The greatest of each half, as unsigned numbers: a half that is not ready is greater than any
// other.
__device__ __forceinline__ std::uint32_t greatest_halves(std::uint32_t before, const uint4& words) {
  return __vmaxu2(__vmaxu2(before, __vmaxu2(words.x, words.y)), __vmaxu2(words.z, words.w));
}

// Waits for one element.
__device__ __forceinline__ float lamport_wait(const float* element) {
  std::uint32_t bits;
  do bits = lamport_load(element);
  while (bits == kNotReady);
  return __uint_as_float(bits);
}
__device__ __forceinline__ std::uint64_t lamport_wait(const std::uint64_t* element) {
  std::uint64_t bits;
  do bits = lamport_load(element);
  while (bits == ~std::uint64_t{0});
  return bits;
}

}  // namespace clusterfusion::device
