// One share of a task of attention, by one warp: an online softmax over its groups of positions.
//
// Precision: what rounding takes from a query and from the softmax's weights has operand rows and
// columns of its own. The task's queries are taken in quads. Query r of a quad has rows 2 r and
// 2 r + 1 of half an operand A of the scores, the other half is another quad's or zero; and its
// weights have columns 2 r and 2 r + 1 of operand B of the quad's outputs. All quads share what was
// loaded of keys and values. Where there is no query, rows and columns may hold anything (of
// several quads what happens to lie in shared memory): what comes of them stays in rows and columns
// that nobody reads.
#pragma once

#include "backend/cuda/numeric/attention_operands.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/stream/attention_task.cuh"

namespace clusterfusion::cuda::stream {

// `kMaxSteps`: 16-wide steps of a head, at most; `kQuads`: of the task's queries, 1, 2 or 4.
template <typename T, int kMaxSteps, int kQuads>
class AttentionShare {
 public:
  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16 && plan::kQuadQueries == 4);
  static_assert(kQuads == 1 || kQuads == 2 || kQuads == 4);

  // `zeros`: 16 bytes of them, in shared memory.
  __device__ __forceinline__ AttentionShare(int head_dim, int lane, const void* zeros)
      : head_dim_(head_dim),
        lane_(lane),
        g_(lane / 4),
        q_(lane % 4),
        zeros_(shared_address(zeros)) {}

  __device__ __forceinline__ void begin(const AttentionTask& task, const TaskMemory<T>& memory) {
    fresh_ = shared_address(memory.fresh(0));
    query_ =
        shared_address(memory.queries()) + (kQuads == 1 ? g_ * head_dim_ * 2 + q_ * 8 : lane_ * 16);
    query_rows_ = 2 * task.rows;
    if constexpr (kQueriesInRegisters) {
#pragma unroll
      for (int t = 0; t < kMaxSteps; ++t)
#pragma unroll
        for (int o = 0; o < kOperands; ++o) step_[t][o] = query_step(t, o);
    }
    clear();
  }
  // Begins another share.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      maximum_[o] = -INFINITY;
      sum_[o] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (float(&output)[4] : output_[i]) output[0] = output[1] = output[2] = output[3] = 0.0f;
  }

  // A group of positions from `first` on, whose keys and values lie at these addresses in shared
  // memory, but for those of the fresh rows. What lies behind the last position must not reach a
  // product with values.
  __device__ __forceinline__ void attend(const AttentionTask& task, int first, std::uint32_t keys,
                                         std::uint32_t values) {
    float score[kOperands][2][4] = {};  // of the group's halves
    multiply_keys(task, first, keys, score);
    const ValueRow row = value_row(task, first, values);
    uint4 value[kStepsAtOnce];
    load_value_steps(row, lane_, 0, head_dim_, value);
    std::uint32_t weights[kQuads][2];
    float correction[kQuads];
#pragma unroll
    for (int o = 0; o < kOperands; ++o)
      weigh(task, first, o, score[o], &weights[2 * o], &correction[2 * o]);
#pragma unroll
    for (int begin = 0; begin < kMaxSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_value_steps(row, lane_, begin, head_dim_, value);
#pragma unroll
      for (int t = 0; t < kStepsAtOnce; ++t) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          float(&output)[4] = output_[i][begin + t];
          for (float& element : output) element *= correction[i];
          mma_16x8x16<T>(output, value[t], weights[i][0], weights[i][1]);
        }
      }
    }
  }

  // Leaves what was found for each query in the state of share `which`: maximum, sum, and the
  // output, not normalised.
  __device__ __forceinline__ void keep(const AttentionTask& task, const TaskMemory<T>& memory,
                                       int which) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int query = 4 * i + q_;
      if (query >= task.rows) continue;
      float* state = memory.state(query, which);
#pragma unroll
      for (int t = 0; t < kMaxSteps; ++t) {
        if (16 * t >= head_dim_) continue;
        const float(&output)[4] = output_[i][t];
        state[2 + 16 * t + g_] = both_parts(output[0], output[1]);
        state[2 + 16 * t + g_ + 8] = both_parts(output[2], output[3]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const float sum = warp_sum<4>(sum_[o]);
      const int query = weighed_query(o);
      if (q_ != 0 || query >= task.rows || (kQuads == 1 && is_second_part())) continue;
      float* state = memory.state(query, which);
      state[0] = maximum_[o];
      state[1] = sum;
    }
  }

 private:
  static constexpr int kOperands = (kQuads + 1) / 2;
  // Of wide heads, and of many queries, there are no registers left for the queries.
  static constexpr bool kQueriesInRegisters = kMaxSteps * kQuads <= 10;
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kQuads == 4 ? 1 : kMaxSteps <= 5 ? kMaxSteps : 4;
  static_assert(kMaxSteps % kStepsAtOnce == 0);

  // Step t of the queries of operand o.
  __device__ __forceinline__ uint4 query_step(int t, int o) const {
    const bool is_there = 16 * t < head_dim_;
    if constexpr (kQuads > 1)
      return load_shared_4_if(query_ + t * 512 + o * 32 * head_dim_, is_there);
    const uint2 low = load_shared_2_if(query_ + t * 32, g_ < query_rows_ && is_there);
    return make_uint4(low.x, 0, low.y, 0);
  }

  // score += queries keys, for the two halves of a group.
  __device__ __forceinline__ void multiply_keys(const AttentionTask& task, int first,
                                                std::uint32_t keys,
                                                float (&score)[kOperands][2][4]) const {
    const int row_bytes = head_dim_ * 2;
    std::uint32_t row[2];  // of position g of each half
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int fresh = first + 8 * half + g_ - task.first_position;
      row[half] = fresh < 0 ? keys + (8 * half + g_) * row_bytes
                            : fresh_ + min(fresh, task.fresh_rows - 1) * 2 * row_bytes;
      row[half] += q_ * 8;
    }
    const auto step = [&](int t, int o) {
      if constexpr (kQueriesInRegisters)
        return step_[t][o];
      else
        return query_step(t, o);
    };
    multiply_key_steps<T, kMaxSteps, kStepsAtOnce>(step, row, head_dim_, score);
  }

  // Where the values lie that this lane points at.
  __device__ __forceinline__ ValueRow value_row(const AttentionTask& task, int first,
                                                std::uint32_t values) const {
    const int row = value_position(lane_);
    const int fresh = first + row - task.first_position;
    if (fresh < 0) return {values + row * head_dim_ * 2, ~0u};
    if (fresh < task.fresh_rows) return {fresh_ + (2 * fresh + 1) * head_dim_ * 2, ~0u};
    return {zeros_, 0u};
  }

  __device__ __forceinline__ bool is_second_part() const { return g_ % 2 != 0; }
  // Which query this lane weighs of operand o. The two lanes that have a query's two parts share
  // the work: the first one has the operand's first quad, the second one the other quad, if there
  // is one.
  __device__ __forceinline__ int weighed_query(int o) const {
    return 8 * o + (kQuads > 1 && is_second_part() ? 4 : 0) + g_ / 2;
  }

  // From the scores of operand o for a group, which begins at position `first`, the weights of the
  // values for each of its quads (1 or 2) as operand B, and what each quad's outputs are to be
  // multiplied by. Updates maximum and sum.
  __device__ __forceinline__ void weigh(const AttentionTask& task, int first, int o,
                                        const float (&score)[2][4], std::uint32_t (*weights)[2],
                                        float* quad_correction) {
    constexpr bool kShares = kQuads > 1;
    const bool is_second = is_second_part();
    const int position = task.position(weighed_query(o));
    float maximum = maximum_[o];
    float weight[2][2];  // at first the scores
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of_first = score[half][i], of_second = score[half][2 + i];
        const float kept = kShares && is_second ? of_second : of_first;
        const float given = kShares && !is_second ? of_second : of_first;
        const float other = __shfl_xor_sync(kAllLanes, given, 4);
        float& own = weight[half][i];
        own = is_second ? both_parts(other, kept) : both_parts(kept, other);
        if (first + 8 * half + 2 * q_ + i > position) own = -INFINITY;
        maximum = fmaxf(maximum, own);
      }
    }
    maximum = warp_max<4>(maximum);
    // A query that has seen nothing yet has no maximum to take away.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    const float correction = exp2_approximately(maximum_[o] - base);
    maximum_[o] = maximum;
    sum_[o] = __fmul_rn(sum_[o], correction);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float(&own)[2] = weight[half];
      own[0] = exp2_approximately(own[0] - base);
      own[1] = exp2_approximately(own[1] - base);
      sum_[o] += own[0] + own[1];
      const std::uint32_t rounded = pack<T>(own[0], own[1]);
      const float2 value = unpack<T>(rounded);
      const std::uint32_t rest = pack<T>(own[0] - value.x, own[1] - value.y);
      weights[0][half] = is_second ? rest : rounded;
      if constexpr (kShares) {
        const std::uint32_t other = __shfl_xor_sync(kAllLanes, is_second ? rounded : rest, 4);
        weights[1][half] = is_second ? rest : other;
        if (is_second) weights[0][half] = other;
      }
    }
    quad_correction[0] = __shfl_sync(kAllLanes, correction, 8 * q_);
    if constexpr (kShares) quad_correction[1] = __shfl_sync(kAllLanes, correction, 8 * q_ + 4);
  }

  int head_dim_, lane_, g_, q_;
  std::uint32_t zeros_, fresh_ = 0, query_ = 0;  // addresses in shared memory
  int query_rows_ = 0;                           // of one quad's operand, that hold a query
  uint4 step_[kQueriesInRegisters ? kMaxSteps : 1][kOperands];
  // Of the online softmax, in base-2 logarithms: of the query that this lane weighs, the sum over
  // this lane's columns.
  float maximum_[kOperands], sum_[kOperands];
  // Of query q of each quad: [0] + [1] is dimension 16 t + g, [2] + [3] 16 t + g + 8.
  float output_[kQuads][kMaxSteps][4];
};

// Puts the keys and values of a task's rows at positions `first` .. + 15 into the cache, where
// their KV block lies at `block`; by a warp. Other rows of the sequence are other tasks'.
template <typename T>
__device__ __forceinline__ void store_fresh(const AttentionTask& task, const TaskMemory<T>& memory,
                                            const StreamParams& p, int first, char* block,
                                            int lane) {
  const int begin = max(first, task.position(0));
  const int end = min(first + AttentionShare<T, 1, 1>::kGroup, task.last_position() + 1);
  // Half a warp has the key, the other one the value, 16 bytes a lane.
  const int is_value = lane / 16, vectors = p.head_dim / 8;
  const int before = is_value * p.kv_block_positions + first % p.kv_block_positions - first;
  for (int position = begin; position < end; ++position) {
    const auto* from = reinterpret_cast<const uint4*>(memory.fresh(position - task.first_position) +
                                                      is_value * p.head_dim);
    auto* to = reinterpret_cast<uint4*>(block) + (before + position) * vectors;
    for (int i = lane % 16; i < vectors; i += 16) to[i] = from[i];
  }
}

}  // namespace clusterfusion::cuda::stream
