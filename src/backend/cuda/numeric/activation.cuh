// The activation functions of the MLP, in float32.
#pragma once

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

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
