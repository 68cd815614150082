// One share of a task of attention, by one warp: an online softmax over its groups of positions.
//
// Precision: what rounding takes from a query and from the softmax's weights has operand rows and
// columns of its own. Query r of a task has rows 2 r and 2 r + 1 of operand A of the scores, and
// its weights columns 2 r and 2 r + 1 of operand B of the outputs.
#pragma once

#include "backend/cuda/numeric/attention_operands.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/stream/attention_task.cuh"

namespace clusterfusion::cuda::stream {

// `kMaxSteps`: 16-wide steps of a head, at most.
template <typename T, int kMaxSteps>
class AttentionShare {
 public:
  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);

  // `zeros`: 16 bytes of them, in shared memory.
  __device__ __forceinline__ AttentionShare(int head_dim, int lane, const void* zeros)
      : head_dim_(head_dim),
        lane_(lane),
        g_(lane / 4),
        q_(lane % 4),
        zeros_(shared_address(zeros)) {}

  __device__ __forceinline__ void begin(const AttentionTask& task, const TaskMemory<T>& memory) {
    fresh_ = shared_address(memory.fresh(0));
    // Row g of operand A: lanes whose row has no query multiply by zero.
    query_ = shared_address(memory.query(0)) + (g_ * head_dim_ + 4 * q_) * 2;
    has_query_ = g_ < 2 * task.rows;
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int t = 0; t < kMaxSteps; ++t) step_[t] = query_step(t);
    }
    clear();
  }
  // Begins another share.
  __device__ __forceinline__ void clear() {
    maximum_ = -INFINITY;
    sum_ = 0.0f;
#pragma unroll
    for (int t = 0; t < kMaxSteps; ++t)
      output_[t][0] = output_[t][1] = output_[t][2] = output_[t][3] = 0.0f;
  }

  // A group of positions from `first` on, whose keys and values lie at these addresses in shared
  // memory, but for those of the fresh rows. What lies behind the last position must not reach a
  // product with values.
  __device__ __forceinline__ void attend(const AttentionTask& task, int first, std::uint32_t keys,
                                         std::uint32_t values) {
    float score[2][4] = {};  // of the group's halves
    multiply_keys(task, first, keys, score);
    const ValueRow row = value_row(task, first, values);
    uint4 value[kStepsAtOnce];
    load_value_steps(row, lane_, 0, head_dim_, value);
    std::uint32_t weights[2];
    const float correction = weigh(first, task, score, weights);
#pragma unroll
    for (int begin = 0; begin < kMaxSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_value_steps(row, lane_, begin, head_dim_, value);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        float(&output)[4] = output_[begin + i];
        for (float& element : output) element *= correction;
        mma_16x8x16<T>(output, value[i], weights[0], weights[1]);
      }
    }
  }

  // Leaves what was found for query r: maximum, sum, and the output, not normalised.
  __device__ __forceinline__ void keep(int r, float* state) const {
    const float sum = warp_sum<4>(sum_);
#pragma unroll
    for (int t = 0; t < kMaxSteps; ++t) {
      if (16 * t >= head_dim_ || q_ != r) continue;
      state[2 + 16 * t + g_] = both_parts(output_[t][0], output_[t][1]);
      state[2 + 16 * t + g_ + 8] = both_parts(output_[t][2], output_[t][3]);
    }
    if (lane_ == 8 * r) {
      state[0] = maximum_;
      state[1] = sum;
    }
  }

 private:
  // Wide heads have no registers left for the query.
  static constexpr bool kQueryInRegisters = kMaxSteps <= 8;
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kMaxSteps <= 5 ? kMaxSteps : 4;
  static_assert(kMaxSteps % kStepsAtOnce == 0);

  __device__ __forceinline__ uint2 query_step(int t) const {
    return load_shared_2_if(query_ + t * 32, has_query_ && 16 * t < head_dim_);
  }

  // score += query keys, for the two halves of a group.
  __device__ __forceinline__ void multiply_keys(const AttentionTask& task, int first,
                                                std::uint32_t keys, float (&score)[2][4]) const {
    const int row_bytes = head_dim_ * 2;
    std::uint32_t row[2];  // of position g of each half
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int fresh = first + 8 * half + g_ - task.first_position;
      row[half] = fresh < 0 ? keys + (8 * half + g_) * row_bytes
                            : fresh_ + min(fresh, task.fresh_rows() - 1) * 2 * row_bytes;
      row[half] += q_ * 8;
    }
    const auto step = [&](int t) {
      if constexpr (kQueryInRegisters)
        return step_[t];
      else
        return query_step(t);
    };
    multiply_key_steps<T, kMaxSteps, kStepsAtOnce>(step, row, head_dim_, score);
  }

  // Where the values lie that this lane points at.
  __device__ __forceinline__ ValueRow value_row(const AttentionTask& task, int first,
                                                std::uint32_t values) const {
    const int row = value_position(lane_);
    const int fresh = first + row - task.first_position;
    if (fresh < 0) return {values + row * head_dim_ * 2, ~0u};
    if (fresh < task.fresh_rows()) return {fresh_ + (2 * fresh + 1) * head_dim_ * 2, ~0u};
    return {zeros_, 0u};
  }

  // From the scores of a group, which begins at position `first`, the weights of its values as
  // operand B. Updates the state but for its outputs; returns what these are to be multiplied by.
  __device__ __forceinline__ float weigh(int first, const AttentionTask& task, float (&score)[2][4],
                                         std::uint32_t (&weights)[2]) {
    const bool is_second_part = g_ % 2 != 0;
    const int position = task.position(g_ / 2);
    float maximum = maximum_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& own = score[half][i];
        const float other = __shfl_xor_sync(kAllLanes, own, 4);
        own = is_second_part ? both_parts(other, own) : both_parts(own, other);
        if (first + 8 * half + 2 * q_ + i > position) own = -INFINITY;
        maximum = fmaxf(maximum, own);
      }
    }
    maximum = warp_max<4>(maximum);
    // A query that has seen nothing yet has no maximum to take away.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    const float correction = exp2_approximately(maximum_ - base);
    maximum_ = maximum;
    sum_ = __fmul_rn(sum_, correction);
    const bool is_valid = g_ / 2 < task.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight0 = is_valid ? exp2_approximately(score[half][0] - base) : 0.0f;
      const float weight1 = is_valid ? exp2_approximately(score[half][1] - base) : 0.0f;
      sum_ += weight0 + weight1;
      weights[half] = pack<T>(weight0, weight1);
      const float2 rounded = unpack<T>(weights[half]);
      if (is_second_part) weights[half] = pack<T>(weight0 - rounded.x, weight1 - rounded.y);
    }
    return __shfl_sync(kAllLanes, correction, 8 * q_);
  }

  int head_dim_, lane_, g_, q_;
  std::uint32_t zeros_, fresh_ = 0, query_ = 0;  // addresses in shared memory
  bool has_query_ = false;
  uint2 step_[kQueryInRegisters ? kMaxSteps : 1];
  // Of the online softmax; base-2 logarithms.
  float maximum_;  // of query g / 2
  float sum_;      // of query g / 2: this lane's columns
  // Of query q: [0] + [1] is dimension 16 t + g, [2] + [3] 16 t + g + 8.
  float output_[kMaxSteps][4];
};

// Puts the keys and values of a task's rows at positions `first` .. + 15 into the cache, where
// their KV block lies at `block`; by a warp. Other rows of the sequence are other tasks'.
template <typename T>
__device__ __forceinline__ void store_fresh(const AttentionTask& task, const TaskMemory<T>& memory,
                                            const StreamParams& p, int first, char* block,
                                            int lane) {
  const int begin = max(first, task.position(0));
  const int end = min(first + AttentionShare<T, 1>::kGroup, task.last_position() + 1);
  for (int position = begin; position < end; ++position) {
    const T* key = memory.fresh(position - task.first_position);
    T* to = reinterpret_cast<T*>(block) + position % p.kv_block_positions * p.head_dim;
    for (int dim = lane; dim < p.head_dim; dim += 32) {
      to[dim] = key[dim];
      to[p.kv_block_positions * p.head_dim + dim] = key[p.head_dim + dim];
    }
  }
}

}  // namespace clusterfusion::cuda::stream
