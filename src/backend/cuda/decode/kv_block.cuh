// How a warp takes a block of keys and values that has landed: for attention with and without
// groups of heads.
#pragma once

#include "backend/cuda/decode/residual.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeKvBlock : public DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::p;

  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kMaxHeadSteps <= 5 ? kMaxHeadSteps : 4;
  static_assert(kMaxHeadSteps % kStepsAtOnce == 0);

  // Steps of a group's values from step `begin` on, as operands A.
  __device__ __forceinline__ void load_values(std::uint32_t rows, int begin,
                                              uint4 (&value)[kStepsAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kStepsAtOnce; ++i) {
      value[i] = make_uint4(0, 0, 0, 0);
      if (16 * (begin + i) < p.head_dim)
        value[i] = load_matrix_4_transposed(rows + (begin + i) * 32);
    }
  }
};

}  // namespace clusterfusion::cuda
