// Accesses to shared memory by address.
#pragma once

#include <cstdint>
#include <cstring>

namespace clusterfusion::device {

__device__ __forceinline__ uint4 load_shared_4(std::uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

__device__ __forceinline__ float4 load_shared_float_4(std::uint32_t address) {
  float4 values;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "r"(address)
               : "memory");
  return values;
}

__device__ __forceinline__ void store_shared_2(std::uint32_t address, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second)
               : "memory");
}

__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_shared_4(std::uint32_t address, const float4& values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(values.x),
               "f"(values.y), "f"(values.z), "f"(values.w)
               : "memory");
}

// Predicated: two words, or zeros.
__device__ __forceinline__ uint2 load_shared_2_if(std::uint32_t address, int predicate) {
  uint2 words;
  asm volatile(
      "{\n"
      ".reg .pred predicate;\n"
      "setp.ne.s32 predicate, %3, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "@predicate ld.shared.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "=&r"(words.x), "=&r"(words.y)
      : "r"(address), "r"(predicate)
      : "memory");
  return words;
}

// Predicated: four words, or zeros.
__device__ __forceinline__ uint4 load_shared_4_if(std::uint32_t address, int predicate) {
  uint4 words;
  asm volatile(
      "{\n"
      ".reg .pred predicate;\n"
      "setp.ne.s32 predicate, %5, 0;\n"
      "mov.u32 %0, 0;\n"
      "mov.u32 %1, 0;\n"
      "mov.u32 %2, 0;\n"
      "mov.u32 %3, 0;\n"
      "@predicate ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(words.x), "=&r"(words.y), "=&r"(words.z), "=&r"(words.w)
      : "r"(address), "r"(predicate)
      : "memory");
  return words;
}

// Predicated: a number, or 0.
__device__ __forceinline__ float load_shared_if(std::uint32_t address, int predicate, float) {
  float value;
  asm volatile(
      "{\n"
      ".reg .pred predicate;\n"
      "setp.ne.s32 predicate, %2, 0;\n"
      "mov.f32 %0, 0f00000000;\n"
      "@predicate ld.shared.f32 %0, [%1];\n"
      "}"
      : "=f"(value)
      : "r"(address), "r"(predicate)
      : "memory");
  return value;
}
// The same of a 16-bit float of either type.
template <typename T>
__device__ __forceinline__ float load_shared_if(std::uint32_t address, int predicate, T) {
  static_assert(sizeof(T) == 2);
  std::uint16_t bits;
  asm volatile(
      "{\n"
      ".reg .pred predicate;\n"
      "setp.ne.s32 predicate, %2, 0;\n"
      "mov.u16 %0, 0;\n"
      "@predicate ld.shared.u16 %0, [%1];\n"
      "}"
      : "=h"(bits)
      : "r"(address), "r"(predicate)
      : "memory");
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

}  // namespace clusterfusion::device
