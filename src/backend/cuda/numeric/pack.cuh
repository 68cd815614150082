// Conversions between pairs of the weights' 16-bit type and float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/ptx/mma.cuh"

namespace clusterfusion::cuda {

using device::MmaInput;

// Two floats, rounded, packed with the first in the low half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  if constexpr (MmaInput<T>::kIsHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair) {
  if constexpr (MmaInput<T>::kIsHalf) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

}  // namespace clusterfusion::cuda
