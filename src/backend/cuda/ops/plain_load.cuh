// Neighbouring elements of a vector as float32.
#pragma once

#include "backend/cuda/numeric/pack.cuh"

namespace clusterfusion::cuda {

// Elements of a 16-bit type that one load brings.
inline constexpr int kVectorElements = 8;

// `kCount` is 1, or kVectorElements where `from` is a multiple of 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
  static_assert(kCount == 1 || kCount == kVectorElements);
  if constexpr (kCount == 1) {
    to[0] = static_cast<float>(*from);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const std::uint32_t pairs[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const float2 two = unpack<T>(pairs[i / 2]);
      to[i] = two.x;
      to[i + 1] = two.y;
    }
  }
}

}  // namespace clusterfusion::cuda
