// Conversions between the weights' 16-bit types and float32, the order of activations in memory,
// and the activation functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "backend/cuda/device/mma.cuh"
#include "clusterfusion/model.hpp"

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

// Within 2 units of the last place; 0 where the result is too small for a normal number.
__device__ __forceinline__ float exp2_approximately(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Where element `index` of a vector of activations lies: of each 8, the words (pairs) 1 and 2
// change places, so that the words of an operand of the tensor cores lie side by side.
__device__ __forceinline__ int operand_order(int index) {
  return (index & ~6) | (index & 2) << 1 | (index & 4) >> 1;
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu_erf: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh: {
      const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.0f + tanhf(inner));
    }
    case Activation::gelu_quick: return x / (1.0f + expf(-1.702f * x));
    case Activation::relu: return fmaxf(x, 0.0f);
    case Activation::relu_squared: return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::mish: return x * tanhf(x > 20.0f ? x : log1pf(expf(x)));
    case Activation::tanh: return tanhf(x);
    case Activation::sigmoid: return 1.0f / (1.0f + expf(-x));
    case Activation::identity: return x;
  }
  return x;
}

}  // namespace clusterfusion::cuda
