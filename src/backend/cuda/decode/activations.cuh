// Activations, operand B of the products: from Lamport buffers or from shared memory to registers.
#pragma once

#include "backend/cuda/decode/matrix_product.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeActivations
    : public DecodeProduct<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeProduct<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::g, Base::kPackedOperands, Base::lane_column, Base::lane_iterations, Base::normed,
      Base::p, Base::prefetch_chunks, Base::q, Base::warp;
  using typename Base::Frag;
  using typename Base::MmaMapping;

  // What lane_column() and swap_columns() are for the matrix, for the activations. With packed
  // operands this lane holds half g % 2 of slice g / 2,
  // if there is one: of each 16 bytes (in operand_order) the first 8 or the second.
  __device__ __forceinline__ int activation_column(const StreamedMatrix& matrix) const {
    if (!kPackedOperands || matrix.mapping == MmaMapping::two_pass) return lane_column(matrix);
    const int column = (warp & (matrix.segments - 1)) * matrix.segment_columns +
                       (g / 2 & ((1 << matrix.slices_log2) - 1)) * matrix.slice_columns + q * 8;
    return matrix.mapping == MmaMapping::packed ? column : column + g % 2 * 4;
  }
  __device__ __forceinline__ int activation_swap(const StreamedMatrix& matrix) const {
    const int slice = kPackedOperands && matrix.mapping != MmaMapping::two_pass ? g / 2 : g;
    return matrix.swaps && slice % 2 != 0 ? 32 : 0;
  }
  // Of packed operands, the half that this lane holds. To be called when the fragments are there.
  __device__ __forceinline__ void select_half(const StreamedMatrix& matrix, Frag& fragments) const {
    if constexpr (kPackedOperands) {
      if (matrix.mapping != MmaMapping::packed) return;
      const bool none = g >= 2 << matrix.slices_log2;
#pragma unroll
      for (uint4& value : fragments.value) {
        value.x = none ? 0 : g % 2 == 0 ? value.x : value.z;
        value.y = none ? 0 : g % 2 == 0 ? value.y : value.w;
      }
    }
  }
  // Fragment i of a Lamport buffer, of which `first` are this lane's first values: of one
  // iteration, or of two with packed pairs.
  template <bool kPackedPairs>
  __device__ __forceinline__ static uint4 load_fragment(const T* first, int swap, int i) {
    if constexpr (!kPackedPairs)
      return lamport_load_4(first + i * 32 + (i % 2 == 0 ? swap : -swap));
    const uint2 even = lamport_load_2(first + 64 * i + swap);
    const uint2 odd = lamport_load_2(first + 64 * i + 32 - swap);
    return make_uint4(even.x, even.y, odd.x, odd.y);
  }

  // A Lamport buffer of 16-bit activations as fragments: issues the loads once ...
  __device__ __forceinline__ void request_activations(const StreamedMatrix& matrix,
                                                      std::int32_t offset, Frag& fragments) const {
    if (kPackedOperands && matrix.mapping == MmaMapping::packed_pairs)
      request_activations<true>(matrix, offset, fragments);
    else
      request_activations<false>(matrix, offset, fragments);
  }
  template <bool kPackedPairs>
  __device__ __forceinline__ void request_activations(const StreamedMatrix& matrix,
                                                      std::int32_t offset, Frag& fragments) const {
    const int column = activation_column(matrix);
    const T* first = this->template lamport<const T>(offset) + column;
    const int swap = activation_swap(matrix);
    const int iterations = lane_iterations(matrix, column);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      fragments.value[i] = make_uint4(0, 0, 0, 0);
      if (i < (kPackedPairs ? matrix.iterations / 2 : iterations))
        fragments.value[i] = load_fragment<kPackedPairs>(first, swap, i);
    }
  }
  // ... and repeats those of missing elements until all that this lane needs are there.
  __device__ __forceinline__ void await_activations(const StreamedMatrix& matrix,
                                                    std::int32_t offset, Frag& fragments) {
    const T* first = this->template lamport<const T>(offset) + activation_column(matrix);
    const int swap = activation_swap(matrix);
    prefetch_chunks();
    while (__any_sync(kAllLanes, is_any_missing(fragments))) {
#pragma unroll
      for (int i = 0; i < kMaxIterations; ++i) {
        if (!any_half_not_ready(fragments.value[i])) continue;
        if (kPackedOperands && matrix.mapping == MmaMapping::packed_pairs)
          fragments.value[i] = load_fragment<true>(first, swap, i);
        else
          fragments.value[i] = load_fragment<false>(first, swap, i);
      }
      prefetch_chunks();
    }
    select_half(matrix, fragments);
  }

  __device__ __forceinline__ static bool is_any_missing(const Frag& fragments) {
    std::uint32_t greatest = 0;
#pragma unroll
    for (const uint4& value : fragments.value) greatest = greatest_halves(greatest, value);
    return half_not_ready(greatest) != 0;
  }

  // One of the normalised inputs as fragments; a barrier lies behind normalise().
  __device__ __forceinline__ void load_normed(const StreamedMatrix& matrix, int input,
                                              Frag& fragments) const {
    const int column = activation_column(matrix);
    const T* first = normed + input * p.hidden_size + column;
    const int swap = activation_swap(matrix);
    const int iterations = lane_iterations(matrix, column);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      fragments.value[i] = make_uint4(0, 0, 0, 0);
      if (i < iterations)
        fragments.value[i] =
            *reinterpret_cast<const uint4*>(first + i * 32 + (i % 2 == 0 ? swap : -swap));
    }
    select_half(matrix, fragments);
  }
};

}  // namespace clusterfusion::cuda
