// Values of attention on their way from shared memory into products.
#pragma once

#include "backend/cuda/ptx/mma.cuh"

namespace clusterfusion::device {

// Where the values of one position lie, for a lane's loads.
struct ValueRow {
  std::uint32_t address;
  std::uint32_t offsets;  // all ones, or zero where every 16 bytes of the row are the same
  __device__ __forceinline__ std::uint32_t at(std::uint32_t byte) const {
    return address + (byte & offsets);
  }
};

// Which of a group's 16 positions a lane points at in load_value_steps().
__device__ __forceinline__ int value_position(int lane) { return lane / 16 * 8 + lane % 8; }

// Of a group's 16 positions, dimensions 16 t to 16 t + 15 for t from `begin` on, as operands A;
// what is behind the head's end is zero.
template <int kSteps>
__device__ __forceinline__ void load_value_steps(const ValueRow& row, int lane, int begin,
                                                 int head_dim, uint4 (&value)[kSteps]) {
  const std::uint32_t column = lane / 8 % 2 * 16;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    value[i] = make_uint4(0, 0, 0, 0);
    if (16 * (begin + i) < head_dim)
      value[i] = load_matrix_4_transposed(row.at(column + (begin + i) * 32));
  }
}

}  // namespace clusterfusion::device
