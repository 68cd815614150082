// What the kernels' online softmaxes share: base-2 exponentials, and sums of split operands.
#pragma once

namespace clusterfusion::cuda {

// Scores that are multiplied by it are base-2 logarithms of weights.
inline constexpr float kLog2E = 1.4426950408889634f;

// Within 2 units of the last place; 0 where the result is too small for a normal number.
__device__ __forceinline__ float exp2_approximately(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A product of an operand that was split into its rounded value and the rounding error: both parts
// together. What is infinite stays so: the second part is then zero times infinity, or infinity of
// another sign.
__device__ __forceinline__ float both_parts(float first, float second) {
  return isinf(first) ? first : first + second;
}

}  // namespace clusterfusion::cuda
