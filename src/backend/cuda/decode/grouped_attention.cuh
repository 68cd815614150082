// Attention of one row where heads share keys and values by groups: each query head of a group has
// two columns of the product with what lands of the keys, and a column of that with the values.
#pragma once

#include "backend/cuda/decode/residual.cuh"
#include "backend/cuda/numeric/attention_operands.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class GroupedAttention
    : public DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeResidual<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::cache, Base::consumer_barrier, Base::control, Base::g, Base::is_ablated,
      Base::is_next, Base::lane, Base::make_indices_opaque, Base::next_id, Base::normed, Base::p,
      Base::q, Base::ring, Base::thread, Base::warp;

  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);

  // Dimensions that the warps merge together.
  __device__ __forceinline__ int merged_dims() const { return min(p.head_dim, plan::kMergedDims); }

  // Of plan::attention_floats: where the normalised inputs lie, which have been read, and sums.
  __device__ __forceinline__ float* scratch() const { return reinterpret_cast<float*>(normed); }

  // Queries, key and value of the current position for one head of keys and values, in shared
  // memory (plan::attention_floats): first as they come from the QKV matrix, normalised where the
  // model does that; then rotated, the queries scaled, all rounded.
  struct GroupInputs {
    float* raw;  // [group + 2, head_dim]
    // [group + 2 + group, head_dim], the queries in operand_order: the last are what rounding took
    // from them.
    T* ready;
    T* zero;  // [8] zeros
  };
  __device__ __forceinline__ GroupInputs group_inputs() const {
    float* raw = scratch() + plan::kConsumerWarps * p.head_group * (merged_dims() + 2);
    T* ready = reinterpret_cast<T*>(raw + (p.head_group + 2) * p.head_dim);
    return {raw, ready, ready + (2 * p.head_group + 2) * p.head_dim};
  }

  // All threads, a warp for each vector.
  __device__ __forceinline__ void prepare_group(int layer, int kv_head, int position) {
    for (int vector = warp; vector < p.head_group + 2; vector += plan::kConsumerWarps)
      prepare_vector(layer, kv_head, vector, position);
    if (thread < 8) group_inputs().zero[thread] = static_cast<T>(0.0f);
    consumer_barrier();
  }

  // A query, the key or the value, by one warp: four neighbouring dimensions a lane. (A layer whose
  // rotation ends within four does not stream: plan::unstreamed_because.)
  __device__ __forceinline__ void prepare_vector(int layer, int kv_head, int vector,
                                                 int position) const {
    constexpr int kQuads = (16 * kMaxHeadSteps + 127) / 128;
    const int group = p.head_group;
    const float* source = this->template lamport<const float>(p.layout.qkv) +
                          (kv_head * (group + 2) + vector) * p.head_dim;
    const bool is_rotated = vector <= group;
    const void* norm =
        vector < group ? p.first_layer.query_norm_weight : p.first_layer.key_norm_weight;
    const bool is_normed = is_rotated && norm != nullptr;
    uint4 bits[kQuads];
    float4 angles[kQuads][2];  // cosines and sines of two dimensions each
    uint2 weight[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int dim = 4 * lane + 128 * j;
      bits[j] = make_uint4(0, 0, 0, 0);
      weight[j] = make_uint2(0, 0);
      angles[j][0] = angles[j][1] = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
      if (dim >= p.head_dim) continue;
      bits[j] = lamport_load_4(source + dim);
      if (is_rotated && dim < p.rotary_dim) cache.angles(position, dim, angles[j]);
      if (is_normed)
        weight[j] = *reinterpret_cast<const uint2*>(
            reinterpret_cast<const T*>(of_layer(p, norm, layer)) + dim);
    }
    float4 value[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      while (any_not_ready(bits[j])) bits[j] = lamport_load_4(source + 4 * lane + 128 * j);
      value[j] = make_float4(__uint_as_float(bits[j].x), __uint_as_float(bits[j].y),
                             __uint_as_float(bits[j].z), __uint_as_float(bits[j].w));
    }
    if (is_normed) normalise_head(weight, value);
    rotate_and_round(vector, value, angles);
  }

  template <int kQuads>
  __device__ __forceinline__ void normalise_head(const uint2 (&weight)[kQuads],
                                                 float4 (&value)[kQuads]) const {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuads; ++j)
      squares += (value[j].x * value[j].x + value[j].y * value[j].y) +
                 (value[j].z * value[j].z + value[j].w * value[j].w);
    const float mean = warp_sum(squares) / static_cast<float>(p.head_dim);
    const float inverse_deviation = rsqrtf(mean + p.layer_norm_eps);
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const float2 low = unpack<T>(weight[j].x), high = unpack<T>(weight[j].y);
      value[j] = make_float4(
          value[j].x * inverse_deviation * low.x, value[j].y * inverse_deviation * low.y,
          value[j].z * inverse_deviation * high.x, value[j].w * inverse_deviation * high.y);
    }
  }

  // The rotation needs elements of other lanes, which come through shared memory.
  template <int kQuads>
  __device__ __forceinline__ void rotate_and_round(int vector, const float4 (&value)[kQuads],
                                                   const float4 (&angles)[kQuads][2]) const {
    const GroupInputs inputs = group_inputs();
    const std::uint32_t raw = shared_address(inputs.raw + vector * p.head_dim);
    const int group = p.head_group, half = p.rotary_dim / 2;
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int dim = 4 * lane + 128 * j;
      if (vector <= group && dim < p.rotary_dim) store_shared_4(raw + 4 * dim, value[j]);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const int dim = 4 * lane + 128 * j;
      if (dim >= p.head_dim) continue;
      float4 turned = value[j];
      if (vector <= group && dim < p.rotary_dim) {
        const bool is_low = dim < half;
        const float4 other = load_shared_float_4(raw + 4 * (is_low ? dim + half : dim - half));
        const float sign = is_low ? -1.0f : 1.0f;
        const float4 &first = angles[j][0], &second = angles[j][1];
        turned = make_float4(value[j].x * first.x + sign * other.x * first.y,
                             value[j].y * first.z + sign * other.y * first.w,
                             value[j].z * second.x + sign * other.z * second.y,
                             value[j].w * second.z + sign * other.w * second.w);
      }
      T* to = inputs.ready + vector * p.head_dim;
      if (vector < group)
        store_query(to, to + (group + 2) * p.head_dim, dim, turned);
      else
        *reinterpret_cast<uint2*>(to + dim) =
            make_uint2(pack<T>(turned.x, turned.y), pack<T>(turned.z, turned.w));
    }
  }

  // Four dimensions of a query, scaled and rounded, and what rounding took.
  __device__ __forceinline__ void store_query(T* to, T* rest_to, int dim,
                                              const float4& query) const {
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
    const float2 pairs[2] = {make_float2(query.x * scale, query.y * scale),
                             make_float2(query.z * scale, query.w * scale)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t word = pack<T>(pairs[i].x, pairs[i].y);
      const float2 rounded = unpack<T>(word);
      const int at = operand_order(dim + 2 * i);
      *reinterpret_cast<std::uint32_t*>(to + at) = word;
      *reinterpret_cast<std::uint32_t*>(rest_to + at) =
          pack<T>(isinf(rounded.x) ? 0.0f : pairs[i].x - rounded.x,
                  isinf(rounded.y) ? 0.0f : pairs[i].y - rounded.y);
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
    // The work scheduler has announced by these what comes.
    const plan::AttentionSplits& splits = control->splits[position - p.first_position];
    while (is_next(Stream::attention)) {
      const RingLabel begin = ring.announcement().label;
      const int task = begin.first;
      const int kv_head = task / splits.splits, split = task % splits.splits;
      const int end_block = min((split + 1) * splits.blocks_per_split, splits.blocks);
      prepare_group(layer, kv_head, position);
      Softmax state;
      state.maximum = -INFINITY;
      state.sum = 0.0f;
#pragma unroll
      for (int t = 0; t < kMaxHeadSteps; ++t)
        state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
      attend_blocks(begin.second, end_block, position, state);
      combine_warps(layer, kv_head, task, splits.splits, state);
      if (end_block == splits.blocks) store_current(layer, kv_head, position);
      consumer_barrier();
    }
  }

  // A task's blocks, which follow each other in the ring. The warps take the groups of one block
  // after the other round-robin.
  __device__ __forceinline__ void attend_blocks(int begin, int end, int position, Softmax& state) {
    const int groups = p.kv_block_positions / kGroup;
    for (int block = begin; block < end; ++block) {
      ring.wait_landed();
      const int group = (warp - block * groups) & (plan::kConsumerWarps - 1);
      const int first = block * p.kv_block_positions + group * kGroup;
      if (group < groups && first <= position)
        attend_group(first, ring.data() + group * kGroup * p.head_dim * 2, position, state);
      ring.release(lane);
    }
    next_id = ring.announcement().id;
  }

  // Sixteen positions from `first` on, whose keys lie at `data` in shared memory. The current
  // position's key and value are not in the block yet; what lies behind them must not reach a
  // product.
  __device__ __forceinline__ void attend_group(int first, std::uint32_t data, int position,
                                               Softmax& state) const {
    const int row_bytes = p.head_dim * 2;
    const GroupInputs inputs = group_inputs();
    const std::uint32_t current = shared_address(inputs.ready + p.head_group * p.head_dim);
    std::uint32_t keys[2];
    ValueRow rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t begin = data + 8 * half * row_bytes;
      const bool is_old = first + 8 * half + g < position;
      keys[half] = (is_old ? begin + g * row_bytes : current) + 16 * q;
      const int row = lane % 8, its_position = first + 8 * half + row;
      const std::uint32_t old = begin + (p.kv_block_positions + row) * row_bytes;
      rows[half] = its_position < position    ? ValueRow{old, ~0u}
                   : its_position == position ? ValueRow{current + row_bytes, ~0u}
                                              : ValueRow{shared_address(inputs.zero), 0u};
    }
    float score[2][2];
    score_positions(keys, score);
    add_values(rows, weigh(first, position, score, state), state);
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
  __device__ __forceinline__ Weights weigh(int first, int position, float (&score)[2][2],
                                           Softmax& state) const {
    float maximum = state.maximum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& own = score[half][i];
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

  // The scores of a group: of each half those that this lane has as operand B's row in weigh(), of
  // head g at positions 2 q and 2 q + 1. keys[half]: where this lane's part of the half's position
  // g lies in shared memory.
  //
  // Keys are operand A as they are loaded, 16 bytes a lane, words 0 and 2 in row g, words 1 and 3
  // in row g + 8, as weights are (units.cuh); the queries, operand B, have a column for each half
  // of a head's words. So rows of a power of two of bytes are read without many lanes at one bank.
  __device__ __forceinline__ void score_positions(const std::uint32_t (&keys)[2],
                                                  float (&score)[2][2]) const {
    score[0][0] = score[0][1] = score[1][0] = score[1][1] = 0.0f;
#pragma unroll 1
    for (int first_head = 0; first_head < p.head_group; first_head += kHeadsAtOnce) {
      float rounded[2][4] = {}, rest[2][4] = {};
      multiply_keys(keys, first_head, rounded, rest);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Of position g, head first_head + q.
        const float own =
            both_parts(rounded[half][0] + rounded[half][3], rest[half][0] + rest[half][3]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float other = __shfl_sync(kAllLanes, own, 4 * (2 * q + i) + g % kHeadsAtOnce);
          if (g / kHeadsAtOnce * kHeadsAtOnce == first_head) score[half][i] = other;
        }
      }
    }
  }
  static constexpr int kHeadsAtOnce = 4;

  __device__ __forceinline__ void multiply_keys(const std::uint32_t (&keys)[2], int first_head,
                                                float (&rounded)[2][4], float (&rest)[2][4]) const {
    const int head = first_head + g / 2;
    const std::uint32_t query =
        shared_address(group_inputs().ready + head * p.head_dim) + q * 16 + g % 2 * 8;
    const int rest_bytes = (p.head_group + 2) * p.head_dim * 2;
#pragma unroll
    for (int i = 0; i < (kMaxHeadSteps + 1) / 2; ++i) {
      const bool is_there = 32 * i + 8 * q < p.head_dim;
      const bool has_query = is_there && head < p.head_group;
      const uint2 query_rounded = load_shared_2_if(query + 64 * i, has_query);
      const uint2 query_rest = load_shared_2_if(query + rest_bytes + 64 * i, has_query);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 key = make_uint4(0, 0, 0, 0);
        if (is_there) key = load_shared_4(keys[half] + 64 * i);
        mma_16x8x16<T>(rounded[half], key, query_rounded.x, query_rounded.y);
        mma_16x8x16<T>(rest[half], key, query_rest.x, query_rest.y);
      }
    }
  }

  // Dimensions 32 u to 32 u + 31 of a half's values, 8 positions, of which this lane points at
  // number lane % 8: register c is a quarter of
  // operand A, dimension 32 u + 8 c + g of positions 2 q and 2 q + 1. Each two positions' rows are
  // read at another 16 bytes than the other rows, so that few are read from the same banks; what a
  // lane gets is rotated by that.
  __device__ __forceinline__ uint4 load_values_of_half(const ValueRow& row, int u) const {
    const std::uint32_t chunk = 16 * ((lane / 8 + lane % 8 / 2) % 4);
    const uint4 loaded = load_matrix_4_transposed(row.at(64 * u + chunk));
    const bool by_one = q % 2 != 0, by_two = q / 2 != 0;
    const uint4 once = by_one ? make_uint4(loaded.w, loaded.x, loaded.y, loaded.z) : loaded;
    return by_two ? make_uint4(once.z, once.w, once.x, once.y) : once;
  }

  // output += values weights, in operands A and B. Several units are loaded before the first is
  // multiplied.
  __device__ __forceinline__ void add_values(const ValueRow (&rows)[2], const Weights& weights,
                                             Softmax& state) const {
    constexpr int kUnits = (kMaxHeadSteps + 1) / 2, kAtOnce = 4;
#pragma unroll
    for (int first = 0; first < kUnits; first += kAtOnce) {
      if (32 * first >= p.head_dim) break;
      uint4 low[kAtOnce] = {}, high[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int u = first + i;
        if (u >= kUnits || 32 * u >= p.head_dim) continue;
        low[i] = load_values_of_half(rows[0], u);
        high[i] = load_values_of_half(rows[1], u);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int t = 2 * (first + i);
        add_step(t, make_uint4(low[i].x, low[i].y, high[i].x, high[i].y), weights, state);
        add_step(t + 1, make_uint4(low[i].z, low[i].w, high[i].z, high[i].w), weights, state);
      }
    }
  }
  __device__ __forceinline__ void add_step(int t, const uint4& value, const Weights& weights,
                                           Softmax& state) const {
    if (t >= kMaxHeadSteps) return;
    float(&output)[4] = state.output[t];
    output[0] *= weights.correction.x;
    output[1] *= weights.correction.y;
    output[2] *= weights.correction.x;
    output[3] *= weights.correction.y;
    mma_16x8x16<T>(output, value, weights.rounded[0], weights.rounded[1]);
    mma_16x8x16<T>(output, value, weights.rest[0], weights.rest[1]);
  }

  // Leaves this warp's states where merge() finds them, the outputs from dimension `first` on.
  __device__ __forceinline__ void leave_state(const Softmax& state, int first) const {
    const int stride = merged_dims() + 2;
    float* own = scratch() + warp * p.head_group * stride;
    const int end = min(p.head_dim - first, merged_dims());
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      const int dim = 16 * t - first;
      if (dim < 0 || dim >= end) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = 2 * q + i;
        if (head >= p.head_group) continue;
        own[head * stride + 2 + dim + g] = state.output[t][i];
        own[head * stride + 2 + dim + g + 8] = state.output[t][i + 2];
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
#pragma unroll 1
    for (int first = 0; first < p.head_dim; first += plan::kMergedDims) {
      if (first > 0) consumer_barrier();
      leave_state(state, first);
      consumer_barrier();
      merge(layer, kv_head, task, num_splits, first);
    }
  }

  // Of the dimensions that leave_state() has left, from `first` on.
  __device__ __forceinline__ void merge(int layer, int kv_head, int task, int num_splits,
                                        int first) const {
    const int stride = merged_dims() + 2, group = p.head_group, partial_stride = p.head_dim + 2;
    const int dims = min(p.head_dim - first, merged_dims());
    float* partials =
        this->template lamport<float>(p.layout.partials) + task * group * partial_stride;
    for (int i = thread; i < group * dims; i += kConsumerThreads) {
      const int in_group = i / dims, dim = i % dims;
      const int head = kv_head * group + in_group;
      const float* states = scratch() + in_group * stride;
      const int next = group * stride;  // from one warp's to the next one's
      float maximum = -INFINITY;
      for (int w = 0; w < plan::kConsumerWarps; ++w) maximum = fmaxf(maximum, states[w * next]);
      // Of an ablated head infinity, so that value / total is zero. With several splits the
      // combiners write zeros.
      float total = is_ablated(layer, head) ? INFINITY : 0.0f;
      float value = 0.0f;
      for (int w = 0; w < plan::kConsumerWarps; ++w) {
        const float factor = exp2_approximately(states[w * next] - maximum);
        total += states[w * next + 1] * factor;
        value += states[w * next + 2 + dim] * factor;
      }
      if (num_splits == 1) {
        lamport_store(this->template lamport<T>(p.layout.attention) +
                          operand_order(head * p.head_dim + first + dim),
                      static_cast<T>(value / total));
        continue;
      }
      float* partial = partials + in_group * partial_stride;
      lamport_store(partial + 2 + first + dim, value);
      if (first + dim < 2) lamport_store(partial + first + dim, first + dim == 0 ? maximum : total);
    }
  }

  // Puts the current position's key and value into the cache: behind all that others wait for. (The
  // producers of later steps wait, and have the fence.)
  __device__ __forceinline__ void store_current(int layer, int kv_head, int position) const {
    const T* ready = group_inputs().ready + p.head_group * p.head_dim;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads)
      cache.store(layer, kv_head, position, dim, ready[dim], ready[p.head_dim + dim]);
  }
};

}  // namespace clusterfusion::cuda
