// The device's arithmetic for sampling/weight.hpp.
#pragma once

namespace clusterfusion::cuda {

// The compiler fuses plain operators, but not these.
struct DeviceArithmetic {
  __device__ __forceinline__ static double multiply(double a, double b) { return __dmul_rn(a, b); }
  __device__ __forceinline__ static double add(double a, double b) { return __dadd_rn(a, b); }
};

}  // namespace clusterfusion::cuda
