// Sums and maxima over the lanes of a warp, in a fixed order.
#pragma once

namespace clusterfusion::device {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Over aligned groups of `kWidth` lanes (a power of two); every lane gets its group's sum.
template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int kWidth = 32>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

}  // namespace clusterfusion::device
