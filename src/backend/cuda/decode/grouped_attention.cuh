// Attention of one row where heads share keys and values by groups: each query head of a group is a
// row of the product with what lands of the keys, and a column of that with the values.
#pragma once

#include "backend/cuda/decode/kv_block.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/bulk_copy.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class GroupedAttention
    : public DecodeKvBlock<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeKvBlock<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::cache, Base::consumer_barrier, Base::g, Base::is_ablated, Base::is_next, Base::kGroup,
      Base::kStepsAtOnce, Base::load_values, Base::lane, Base::make_indices_opaque, Base::p,
      Base::q, Base::release_stage, Base::ring, Base::sums, Base::thread, Base::warp;

  // Queries, key and value of the current position for one head of keys and values, in shared
  // memory (plan::attention_sums): first as they come from the QKV matrix, normalised where the
  // model does that; then rotated, the queries scaled, all rounded.
  struct GroupInputs {
    float* raw;  // [group + 2, head_dim]
    T* ready;    // [group + 2 + group, head_dim]: the last are what rounding took from the queries
  };
  __device__ __forceinline__ GroupInputs group_inputs() const {
    float* raw = sums + plan::kConsumerWarps * p.head_group * (p.head_dim + 2);
    return {raw, reinterpret_cast<T*>(raw + (p.head_group + 2) * p.head_dim)};
  }

  // All threads, a warp for each vector.
  __device__ __forceinline__ void prepare_group(int layer, int kv_head, int position) {
    for (int vector = warp; vector < p.head_group + 2; vector += plan::kConsumerWarps)
      prepare_vector(layer, kv_head, vector, position);
    consumer_barrier();
  }

  // A query, the key or the value, by one warp.
  __device__ __forceinline__ void prepare_vector(int layer, int kv_head, int vector,
                                                 int position) const {
    constexpr int kElements = (16 * kMaxHeadSteps + 31) / 32;
    const int group = p.head_group;
    const float* source = this->template lamport<const float>(p.layout.qkv) +
                          (kv_head * (group + 2) + vector) * p.head_dim;
    const bool is_query = vector < group, is_rotated = vector <= group;
    const void* norm = is_query ? p.first_layer.query_norm_weight : p.first_layer.key_norm_weight;
    const bool is_normed = is_rotated && norm != nullptr;
    std::uint32_t bits[kElements];
    float2 angle[kElements];
    float weight[kElements], value[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int dim = lane + 32 * j;
      bits[j] = 0;
      angle[j] = make_float2(1.0f, 0.0f);
      weight[j] = 1.0f;
      if (dim >= p.head_dim) continue;
      bits[j] = lamport_load(source + dim);
      if (is_rotated && dim < p.rotary_dim) angle[j] = cache.angle(position, dim);
      if (is_normed)
        weight[j] = static_cast<float>(reinterpret_cast<const T*>(of_layer(p, norm, layer))[dim]);
    }
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      while (bits[j] == kNotReady) bits[j] = lamport_load(source + lane + 32 * j);
      value[j] = __uint_as_float(bits[j]);
      squares = fmaf(value[j], value[j], squares);
    }
    if (is_normed) {
      const float mean = warp_sum(squares) / static_cast<float>(p.head_dim);
      const float inverse_deviation = rsqrtf(mean + p.layer_norm_eps);
#pragma unroll
      for (int j = 0; j < kElements; ++j) value[j] = value[j] * inverse_deviation * weight[j];
    }
    rotate_and_round(vector, value, angle);
  }

  // The rotation needs elements of other lanes, which come through shared memory.
  template <int kElements>
  __device__ __forceinline__ void rotate_and_round(int vector, const float (&value)[kElements],
                                                   const float2 (&angle)[kElements]) const {
    const GroupInputs inputs = group_inputs();
    float* raw = inputs.raw + vector * p.head_dim;
    const int group = p.head_group, half = p.rotary_dim / 2;
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
#pragma unroll
    for (int j = 0; j < kElements; ++j)
      if (lane + 32 * j < p.head_dim) raw[lane + 32 * j] = value[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const int dim = lane + 32 * j;
      if (dim >= p.head_dim) continue;
      float turned = value[j];
      if (vector <= group && dim < p.rotary_dim) {
        const float other = dim < half ? -raw[dim + half] : raw[dim - half];
        turned = turned * angle[j].x + other * angle[j].y;
      }
      if (vector < group) {
        turned *= scale;
        const float rounded = static_cast<float>(static_cast<T>(turned));
        inputs.ready[(group + 2 + vector) * p.head_dim + dim] =
            static_cast<T>(isinf(rounded) ? 0.0f : turned - rounded);
      }
      inputs.ready[vector * p.head_dim + dim] = static_cast<T>(turned);
    }
  }

  // State of one warp's online softmaxes over its positions; base-2 logarithms.
  struct Softmax {
    float maximum;  // of head g
    float sum;      // of head g: each lane its own columns
    // Dimension 16 t + g of heads 2 q and 2 q + 1, then 16 t + g + 8 of both.
    float output[kMaxHeadSteps][4];
  };

  __device__ __forceinline__ void attend(int layer, int position) {
    make_indices_opaque();
    const plan::AttentionSplits splits = splits_at(p, position);
    Softmax state;
    int task = -1, kv_head = 0, last_block = 0;
    while (is_next(Stream::attention)) {
      const RingAnnouncement what = ring.wait();
      if (what.label.first != task) {
        task = what.label.first;
        kv_head = task / splits.splits;
        const int split = task % splits.splits;
        last_block = min((split + 1) * splits.blocks_per_split, splits.blocks) - 1;
        prepare_group(layer, kv_head, position);
        state.maximum = -INFINITY;
        state.sum = 0.0f;
#pragma unroll
        for (int t = 0; t < kMaxHeadSteps; ++t)
          state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
      }
      const int block = what.label.second;
      attend_block(block, position, what.data, state);
      release_stage();
      if (block < last_block) continue;
      combine_warps(layer, kv_head, task, splits.splits, state);
      if (last_block == splits.blocks - 1) store_current(layer, kv_head, position);
      consumer_barrier();
    }
  }

  // Step t of the queries as operand A: head g rounded in row g, what rounding took from it in row
  // g + 8, so that its precision is that of twice as many bits; other rows are zero.
  __device__ __forceinline__ uint4 query_step(int t) const {
    if (g >= p.head_group || 16 * t >= p.head_dim) return make_uint4(0, 0, 0, 0);
    const T* query = group_inputs().ready + g * p.head_dim + 16 * t + 4 * q;
    const uint2 rounded = *reinterpret_cast<const uint2*>(query);
    const uint2 rest = *reinterpret_cast<const uint2*>(query + (p.head_group + 2) * p.head_dim);
    return make_uint4(rounded.x, rest.x, rounded.y, rest.y);
  }

  // This warp's group of positions of one block, which lies at `data` in shared memory. The warps
  // take the groups of one block after the other round-robin.
  __device__ __forceinline__ void attend_block(int block, int position, std::uint32_t data,
                                               Softmax& state) const {
    const int groups = p.kv_block_positions / kGroup;
    const int group = (warp - block * groups) & (plan::kConsumerWarps - 1);
    if (group >= groups) return;
    const int first = block * p.kv_block_positions + group * kGroup;
    if (first > position) return;
    const int row_bytes = p.head_dim * 2;
    char* keys = static_cast<char*>(__cvta_shared_to_generic(data)) + group * kGroup * row_bytes;
    char* values = keys + p.kv_block_positions * row_bytes;
    if (position < first + kGroup) insert_current(position, keys, values);

    float score[2][4] = {};  // of the group's halves
    multiply_keys(shared_address(keys + g * row_bytes) + q * 8, score);
    // Lanes point at the halves' rows, at the first and the second 8 dimensions of a step.
    const std::uint32_t rows =
        shared_address(values + (lane / 16 * 8 + lane % 8) * row_bytes) + lane / 8 % 2 * 16;
    uint4 value[kStepsAtOnce];
    load_values(rows, 0, value);
    const Weights weights = weigh(first, position, score, state);
#pragma unroll
    for (int begin = 0; begin < kMaxHeadSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_values(rows, begin, value);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        float(&output)[4] = state.output[begin + i];
        output[0] *= weights.correction.x;
        output[1] *= weights.correction.y;
        output[2] *= weights.correction.x;
        output[3] *= weights.correction.y;
        mma_16x8x16<T>(output, value[i], weights.rounded[0], weights.rounded[1]);
        mma_16x8x16<T>(output, value[i], weights.rest[0], weights.rest[1]);
      }
    }
  }

  // What the values of a group are multiplied by, as operands B, a column for each head: rounded,
  // and what rounding took. `correction`: what the outputs of heads 2 q and 2 q + 1 so far are to
  // be multiplied by.
  struct Weights {
    std::uint32_t rounded[2], rest[2];
    float2 correction;
  };
  // From the scores of a group, which begins at position `first`. Updates the state but for its
  // outputs.
  __device__ __forceinline__ Weights weigh(int first, int position, float (&score)[2][4],
                                           Softmax& state) const {
    // Of each half, this lane has head g's scores of positions 2 q and 2 q + 1: of the rounded
    // query, and of the rest.
    float maximum = state.maximum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& own = score[half][i];
        own = both_parts(own, score[half][i + 2]);
        if (first + 8 * half + 2 * q + i > position) own = -INFINITY;
        maximum = fmaxf(maximum, own);
      }
    }
    maximum = warp_max<4>(maximum);
    const float correction = exp2_approximately(state.maximum - maximum);
    state.maximum = maximum;
    state.sum *= correction;
    Weights weights;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight0 = exp2_approximately(score[half][0] - maximum);
      const float weight1 = exp2_approximately(score[half][1] - maximum);
      state.sum += weight0 + weight1;
      weights.rounded[half] = pack<T>(weight0, weight1);
      const float2 rounded = unpack<T>(weights.rounded[half]);
      weights.rest[half] = pack<T>(weight0 - rounded.x, weight1 - rounded.y);
    }
    weights.correction = make_float2(__shfl_sync(kAllLanes, correction, 8 * q),
                                     __shfl_sync(kAllLanes, correction, 8 * q + 4));
    return weights;
  }

  // score += queries keys, for the two halves of a group; `keys` is where this lane's part of the
  // first half lies in shared memory.
  __device__ __forceinline__ void multiply_keys(std::uint32_t keys, float (&score)[2][4]) const {
    const int half_bytes = 8 * p.head_dim * 2;
#pragma unroll
    for (int begin = 0; begin < kMaxHeadSteps; begin += kStepsAtOnce) {
      uint4 part[kStepsAtOnce];
      uint2 key[kStepsAtOnce][2];
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const int t = begin + i;
        part[i] = query_step(t);
        const bool is_there = 16 * t < p.head_dim;
        key[i][0] = load_shared_2_if(keys + t * 32, is_there);
        key[i][1] = load_shared_2_if(keys + half_bytes + t * 32, is_there);
      }
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        mma_16x8x16<T>(score[0], part[i], key[i][0].x, key[i][0].y);
        mma_16x8x16<T>(score[1], part[i], key[i][1].x, key[i][1].y);
      }
    }
  }

  // Puts the current position's key and value into the landed block, and clears the values behind
  // it in this group: whatever lies there must not reach a product.
  __device__ __forceinline__ void insert_current(int position, char* keys, char* values) const {
    const int row = position % kGroup;
    const T* ready = group_inputs().ready + p.head_group * p.head_dim;
    for (int dim = lane; dim < p.head_dim; dim += 32) {
      const T key = ready[dim];
      const T value = ready[p.head_dim + dim];
      reinterpret_cast<T*>(keys)[row * p.head_dim + dim] = key;
      reinterpret_cast<T*>(values)[row * p.head_dim + dim] = value;
      for (int later = row + 1; later < kGroup; ++later)
        reinterpret_cast<T*>(values)[later * p.head_dim + dim] = static_cast<T>(0.0f);
    }
    fence_shared_before_bulk_copy();
    __syncwarp();
  }

  // Leaves this warp's states where combine_warps() finds them.
  __device__ __forceinline__ void leave_state(const Softmax& state) const {
    const int stride = p.head_dim + 2;
    float* own = sums + warp * p.head_group * stride;
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      if (16 * t >= p.head_dim) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 2 * q + i;
        if (head >= p.head_group) continue;
        own[head * stride + 2 + 16 * t + g] = state.output[t][i];
        own[head * stride + 2 + 16 * t + g + 8] = state.output[t][i + 2];
      }
    }
    const float sum = warp_sum<4>(state.sum);
    if (q == 0 && g < p.head_group) {
      own[g * stride] = state.maximum;
      own[g * stride + 1] = sum;
    }
  }

  // Merges the eight warps' states of one task: the heads' outputs if it has one split, else
  // partial results for the combiners. A barrier is to lie behind it.
  __device__ __forceinline__ void combine_warps(int layer, int kv_head, int task, int num_splits,
                                                const Softmax& state) {
    leave_state(state);
    consumer_barrier();
    const int stride = p.head_dim + 2, group = p.head_group;
    float* partials = this->template lamport<float>(p.layout.partials) + task * group * stride;
    for (int i = thread; i < group * p.head_dim; i += kConsumerThreads) {
      const int in_group = i / p.head_dim, dim = i % p.head_dim;
      const int head = kv_head * group + in_group;
      const float* states = sums + in_group * stride;
      const int next = group * stride;  // from one warp's to the next one's
      float maximum = -INFINITY;
      for (int w = 0; w < plan::kConsumerWarps; ++w) maximum = fmaxf(maximum, states[w * next]);
      // Of an ablated head infinity, so that value / total is zero. With several splits the
      // combiners write zeros.
      float total = is_ablated(layer, head) ? INFINITY : 0.0f;
      float value = 0.0f;
      for (int w = 0; w < plan::kConsumerWarps; ++w) {
        const float factor = exp2f(states[w * next] - maximum);
        total += states[w * next + 1] * factor;
        value += states[w * next + 2 + dim] * factor;
      }
      if (num_splits == 1) {
        lamport_store(
            this->template lamport<T>(p.layout.attention) + operand_order(head * p.head_dim + dim),
            static_cast<T>(value / total));
        continue;
      }
      lamport_store(partials + in_group * stride + 2 + dim, value);
      if (dim < 2) lamport_store(partials + in_group * stride + dim, dim == 0 ? maximum : total);
    }
  }

  // Puts the current position's key and value into the cache: behind all that others wait for.
  __device__ __forceinline__ void store_current(int layer, int kv_head, int position) const {
    const T* ready = group_inputs().ready + p.head_group * p.head_dim;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads)
      cache.store(layer, kv_head, position, dim, ready[dim], ready[p.head_dim + dim]);
    fence_before_bulk_copy();
  }
};

}  // namespace clusterfusion::cuda
