// LayerNorm in float32, in one pass where that is exact to rounding. Written with every product and
// sum in one order, so that kernels that cut a row alike get the same bits.
//
//   y = (x - mean) / sqrt(variance + eps) weight + bias        (torch.nn.LayerNorm)
#pragma once

namespace clusterfusion::cuda {

// Sums over x - shift, and over its squares: .x and .y of a float2.
__device__ __forceinline__ void add_shifted(float2& sums, float2 x, float shift) {
  const float first = x.x - shift;
  const float second = x.y - shift;
  sums.x += first + second;
  sums.y = fmaf(first, first, fmaf(second, second, sums.y));
}

struct Moments {
  float mean, inverse_deviation;
};

// How many deviations, squared, the mean may be from the shift of a single pass: four bits of the
// variance are lost at most.
inline constexpr float kFewDeviations = 16.0f;

// Mean and deviation of x. `sums_around(shift, pass)` gives the sums of add_shifted() over the
// whole row. The first pass is around `mean_before`, the mean of the LayerNorm before: exact to
// rounding as long as the mean has moved by no more than a few deviations. Where it has moved
// further, a second pass is around the mean just found. `mean_before` becomes the new mean.
template <typename SumsAround>
__device__ __forceinline__ Moments find_moments(float& mean_before, float inverse_size,
                                                float epsilon, SumsAround&& sums_around) {
  float2 sums = sums_around(mean_before, 0);
  float moved = __fmul_rn(sums.x, inverse_size);
  float variance = fmaf(-moved, moved, __fmul_rn(sums.y, inverse_size));
  float mean = mean_before + moved;
  if (!(__fmul_rn(moved, moved) <= kFewDeviations * variance)) {
    sums = sums_around(mean, 1);
    moved = __fmul_rn(sums.x, inverse_size);
    variance = fmaf(-moved, moved, __fmul_rn(sums.y, inverse_size));
    mean += moved;
  }
  mean_before = mean;
  return {mean, rsqrtf(variance + epsilon)};
}

__device__ __forceinline__ float normalized(float x, const Moments& m, float weight, float bias) {
  return fmaf(__fmul_rn(x - m.mean, m.inverse_deviation), weight, bias);
}

}  // namespace clusterfusion::cuda
