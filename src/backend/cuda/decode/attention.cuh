// Attention of one row over what lands of the KV cache, by the consumer warps: split over blocks of
// threads, with an online softmax in each warp.
#pragma once

#include "backend/cuda/decode/residual.cuh"
#include "backend/cuda/numeric/attention_operands.cuh"
#include "backend/cuda/numeric/softmax.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeAttention
    : public DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::cache, Base::consumer_barrier, Base::g, Base::is_ablated, Base::is_next,
      Base::kQueryInRegisters, Base::lane, Base::make_indices_opaque, Base::next_id, Base::p,
      Base::q, Base::ring, Base::sums, Base::thread, Base::warp;

  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kMaxHeadSteps <= 5 ? kMaxHeadSteps : 4;
  static_assert(kMaxHeadSteps % kStepsAtOnce == 0);

  // Query, key and value of the current position for one head, in shared memory: first as they come
  // from the QKV matrix, then the query rotated and scaled, the key rotated, all rounded.
  struct HeadInputs {
    float* raw;  // [3, head_dim]
    T* ready;    // [4, head_dim]: query, key, value, what rounding took from the query; 8 zeros
  };
  __device__ __forceinline__ HeadInputs head_inputs() const {
    float* raw = sums + plan::kConsumerWarps * (p.head_dim + 2);  // behind the warps' states
    return {raw, reinterpret_cast<T*>(raw + 3 * p.head_dim)};
  }

  // All threads: one trip to global memory, two barriers.
  __device__ __forceinline__ void prepare_head(int head, int position) {
    const HeadInputs inputs = head_inputs();
    const float* qkv = this->template lamport<const float>(p.layout.qkv) + head * 3 * p.head_dim;
    const int half = p.rotary_dim / 2;
    constexpr int kRounds = (3 * 16 * kMaxHeadSteps + kConsumerThreads - 1) / kConsumerThreads;
    float2 angle[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = thread + round * kConsumerThreads;
      const int dim = i % p.head_dim;
      angle[round] = make_float2(1.0f, 0.0f);
      if (i < 2 * p.head_dim && dim < p.rotary_dim) angle[round] = cache.angle(position, dim);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = thread + round * kConsumerThreads;
      if (i < 3 * p.head_dim) inputs.raw[i] = lamport_wait(qkv + i);
    }
    consumer_barrier();
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = thread + round * kConsumerThreads;
      if (i >= 3 * p.head_dim) continue;
      const int dim = i % p.head_dim;
      float value = inputs.raw[i];
      if (i < 2 * p.head_dim && dim < p.rotary_dim) {
        const float other = dim < half ? -inputs.raw[i + half] : inputs.raw[i - half];
        value = value * angle[round].x + other * angle[round].y;
      }
      if (i < p.head_dim) {
        value *= scale;
        const float rounded = static_cast<float>(static_cast<T>(value));
        inputs.ready[3 * p.head_dim + i] = static_cast<T>(isinf(rounded) ? 0.0f : value - rounded);
      }
      inputs.ready[i] = static_cast<T>(value);
    }
    if (thread < 8) inputs.ready[4 * p.head_dim + thread] = static_cast<T>(0.0f);
    consumer_barrier();
  }

  // State of one warp's online softmax over its positions of one head; base-2 logarithms.
  struct Softmax {
    float maximum;  // the same in all lanes
    float sum;      // lanes 0 to 3: each its own columns
    // Lanes q = 0: [0] + [1] is dimension 16 t + g, [2] + [3] 16 t + g + 8.
    float output[kMaxHeadSteps][4];
  };

  struct Query {
    uint2 step[kQueryInRegisters ? kMaxHeadSteps : 1];
  };

  __device__ __forceinline__ void attend(int layer, int position) {
    make_indices_opaque();
    const plan::AttentionSplits splits = splits_at(p, position);
    while (is_next(Stream::attention)) {
      const RingLabel begin = ring.announcement().label;
      const int task = begin.first;
      const int head = task / splits.splits, split = task % splits.splits;
      const int end_block = min((split + 1) * splits.blocks_per_split, splits.blocks);
      prepare_head(head, position);
      Query query;
      load_query(query);
      Softmax state;
      state.maximum = -INFINITY;
      state.sum = 0.0f;
#pragma unroll
      for (int t = 0; t < kMaxHeadSteps; ++t)
        state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
      attend_blocks(begin.second, end_block, position, query, state);
      combine_warps(layer, head, task, splits.splits, state);
      if (end_block == splits.blocks) store_current(layer, head, position);
    }
  }

  // A task's blocks, which follow each other in the ring. The warps take the groups of one block
  // after the other round-robin.
  __device__ __forceinline__ void attend_blocks(int begin, int end, int position,
                                                const Query& query, Softmax& state) {
    const int groups = p.kv_block_positions / kGroup;
    for (int block = begin; block < end; ++block) {
      ring.wait_landed();
      const int group = (warp - block * groups) & (plan::kConsumerWarps - 1);
      const int first = block * p.kv_block_positions + group * kGroup;
      if (group < groups && first <= position)
        attend_group(first, ring.data() + group * kGroup * p.head_dim * 2, position, query, state);
      ring.release(lane);
    }
    next_id = ring.announcement().id;
  }

  // Step t of the query as operand A: rounded in row 0, what rounding took from it in row 1, so
  // that its precision is that of twice as many bits; the other rows are zero.
  __device__ __forceinline__ uint2 query_step(int t) const {
    if (g > 1 || 16 * t >= p.head_dim) return make_uint2(0, 0);
    const T* query = head_inputs().ready + (g == 0 ? 0 : 3 * p.head_dim);
    return *reinterpret_cast<const uint2*>(query + 16 * t + 4 * q);
  }
  __device__ __forceinline__ void load_query(Query& query) const {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int t = 0; t < kMaxHeadSteps; ++t) query.step[t] = query_step(t);
    }
  }

  // Sixteen positions from `first` on, whose keys lie at `data` in shared memory. The current
  // position's key and value are not in the block; what lies behind them must not reach a product.
  __device__ __forceinline__ void attend_group(int first, std::uint32_t data, int position,
                                               const Query& query, Softmax& state) const {
    const int row_bytes = p.head_dim * 2;
    const std::uint32_t current = shared_address(head_inputs().ready + p.head_dim);  // its key
    std::uint32_t keys[2];  // of position g of each half
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool is_old = first + 8 * half + g < position;
      keys[half] = (is_old ? data + (8 * half + g) * row_bytes : current) + q * 8;
    }
    float scores[1][2][4] = {};
    float(&score)[2][4] = scores[0];  // of the group's halves
    const auto step = [&](int t, int) {
      uint2 words;
      if constexpr (kQueryInRegisters)
        words = query.step[t];
      else
        words = query_step(t);
      return make_uint4(words.x, 0, words.y, 0);
    };
    multiply_key_steps<T, kMaxHeadSteps, kStepsAtOnce>(step, keys, p.head_dim, scores);
    const ValueRow row = value_row(first, data + p.kv_block_positions * row_bytes, position);
    uint4 value[kStepsAtOnce];
    load_value_steps(row, lane, 0, p.head_dim, value);
    std::uint32_t weights[2];
    const float correction = weigh(first, position, score, state, weights);
#pragma unroll
    for (int begin = 0; begin < kMaxHeadSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_value_steps(row, lane, begin, p.head_dim, value);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        float(&output)[4] = state.output[begin + i];
        for (float& element : output) element *= correction;
        mma_16x8x16<T>(output, value[i], weights[0], weights[1]);
      }
    }
  }

  // Where the values lie that this lane points at.
  __device__ __forceinline__ ValueRow value_row(int first, std::uint32_t values,
                                                int position) const {
    const int row = value_position(lane);
    const T* current = head_inputs().ready + 2 * p.head_dim;
    if (first + row < position) return {values + row * p.head_dim * 2, ~0u};
    if (first + row == position) return {shared_address(current), ~0u};
    return {shared_address(current + 2 * p.head_dim), 0u};
  }

  // From the scores of a group, which begins at position `first`, the weights of its values as
  // operand B: rounded in column 0, what rounding took from them in column 1. Updates the state but
  // for its outputs; returns what these are to be multiplied by.
  __device__ __forceinline__ float weigh(int first, int position, float (&score)[2][4],
                                         Softmax& state, std::uint32_t (&weights)[2]) const {
    // Of each half, lanes 0 to 3 and 4 to 7 hold the scores of positions 2q and 2q + 1, from the
    // two parts of the query.
    float maximum = state.maximum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& own = score[half][i];
        const float other = __shfl_xor_sync(kAllLanes, own, 4);
        own = g == 0 ? both_parts(own, other) : both_parts(other, own);
        if (first + 8 * half + 2 * q + i > position) own = -INFINITY;
        maximum = fmaxf(maximum, own);
      }
    }
    maximum = __shfl_sync(kAllLanes, warp_max<4>(maximum), 0);
    const float correction = exp2_approximately(state.maximum - maximum);
    state.maximum = maximum;
    state.sum *= correction;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight0 = g < 2 ? exp2_approximately(score[half][0] - maximum) : 0.0f;
      const float weight1 = g < 2 ? exp2_approximately(score[half][1] - maximum) : 0.0f;
      state.sum += weight0 + weight1;
      weights[half] = pack<T>(weight0, weight1);
      const float2 rounded = unpack<T>(weights[half]);
      if (g == 1) weights[half] = pack<T>(weight0 - rounded.x, weight1 - rounded.y);
    }
    return correction;
  }

  // Puts the current position's key and value into the cache: behind all that others wait for. (The
  // producers of later steps wait, and have the fence.)
  __device__ __forceinline__ void store_current(int layer, int head, int position) const {
    const T* ready = head_inputs().ready;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads)
      cache.store(layer, head, position, dim, ready[p.head_dim + dim], ready[2 * p.head_dim + dim]);
  }

  // Merges the eight warps' states of one task: the head's output if it has one split, else a
  // partial result for the combiners.
  __device__ __forceinline__ void combine_warps(int layer, int head, int task, int num_splits,
                                                const Softmax& state) {
    const int stride = p.head_dim + 2;
    float* own = sums + warp * stride;
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      if (16 * t >= p.head_dim || q != 0) continue;
      own[2 + 16 * t + g] = both_parts(state.output[t][0], state.output[t][1]);
      own[2 + 16 * t + g + 8] = both_parts(state.output[t][2], state.output[t][3]);
    }
    const float sum = warp_sum<4>(state.sum);
    if (lane == 0) {
      own[0] = state.maximum;
      own[1] = sum;
    }
    consumer_barrier();
    float maximum = -INFINITY;
    for (int w = 0; w < plan::kConsumerWarps; ++w) maximum = fmaxf(maximum, sums[w * stride]);
    // Of an ablated head infinity, so that value / total is zero. With several splits the combiners
    // write zeros.
    float total = is_ablated(layer, head) ? INFINITY : 0.0f;
    for (int w = 0; w < plan::kConsumerWarps; ++w)
      total += sums[w * stride + 1] * exp2f(sums[w * stride] - maximum);
    float* partial = this->template lamport<float>(p.layout.partials) + task * stride;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads) {
      float value = 0.0f;
      for (int w = 0; w < plan::kConsumerWarps; ++w)
        value += sums[w * stride + 2 + dim] * exp2f(sums[w * stride] - maximum);
      if (num_splits == 1)
        lamport_store(
            this->template lamport<T>(p.layout.attention) + operand_order(head * p.head_dim + dim),
            static_cast<T>(value / total));
      else
        lamport_store(partial + 2 + dim, value);
    }
    if (num_splits > 1 && thread < 2)
      lamport_store(partial + thread, thread == 0 ? maximum : total);
    consumer_barrier();
  }
};

}  // namespace clusterfusion::cuda
