// Keys and values of attention on their way from shared memory into products.
#pragma once

#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"

namespace clusterfusion::device {

// score[o] += queries of operand o times keys, for the two halves of a group of 16 positions.
// query_step(t, o): step t of these queries as operand A; `keys`: where this lane's parts of the
// halves' rows lie. `kAtOnce` of the head's `kSteps` steps are under way together.
template <typename T, int kSteps, int kAtOnce, int kOperands, typename QueryStep>
__device__ __forceinline__ void multiply_key_steps(QueryStep&& query_step,
                                                   const std::uint32_t (&keys)[2], int head_dim,
                                                   float (&score)[kOperands][2][4]) {
#pragma unroll
  for (int begin = 0; begin < kSteps; begin += kAtOnce) {
    uint4 query[kAtOnce][kOperands];
    uint2 key[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int t = begin + i;
#pragma unroll
      for (int o = 0; o < kOperands; ++o) query[i][o] = query_step(t, o);
      const bool is_there = 16 * t < head_dim;
      key[i][0] = load_shared_2_if(keys[0] + t * 32, is_there);
      key[i][1] = load_shared_2_if(keys[1] + t * 32, is_there);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int o = 0; o < kOperands; ++o) {
        mma_16x8x16<T>(score[o][0], query[i][o], key[i][0].x, key[i][0].y);
        mma_16x8x16<T>(score[o][1], query[i][o], key[i][1].x, key[i][1].y);
      }
    }
  }
}

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
