// Attention of the step's rows over what lands of the KV cache, by the consumer warps.
//
// A task is a split of one head's context for one group of rows: up to four rows of one sequence at
// consecutive positions, each of which sees its own past only. The warps take groups of 16
// positions round-robin, each with an online softmax of its own, and merge at the end. Keys and
// values of the step's own rows are put into the landed block and into the cache.
//
// Precision: what rounding takes from a query and from the softmax's weights has operand rows and
// columns of its own. Query r of a task has rows 2 r and 2 r + 1 of operand A of the scores, and
// its weights columns 2 r and 2 r + 1 of operand B of the outputs.
#pragma once

#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/bulk_copy.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/choose_token.cuh"
#include "backend/cuda/stream/consumer.cuh"

namespace clusterfusion::cuda::stream {

// `kMaxSteps`: 16-wide steps of a head, at most. `Block`: what knows the threads and where things
// are, Consumer or what stands for it in a kernel of attention alone.
template <typename T, int kMaxSteps, typename Block = Consumer>
class Attention {
 public:
  __device__ __forceinline__ explicit Attention(Block& block) : c(block) {}

  // All tasks of this block in this layer. Scratch must be free.
  __device__ __forceinline__ void run(int step) {
    c.make_indices_opaque();
    Query query;
    Softmax state;
    Task task{};
    int label = -1;
    while (c.is_next(kAttentionPhase)) {
      c.ring.wait_landed();
      if (c.next.label.first != label) {
        label = c.next.label.first;
        task = task_of(label, step);
        begin(task, query, state);
      }
      constexpr int kLast = 1 << 30;
      const bool is_last = (c.next.label.second & kLast) != 0;
      attend_block(task, c.next.label.second & ~kLast, query, state);
      c.ring.release(c.lane);
      c.await_announcement();
      if (!is_last) continue;
      combine_warps(task, state);
      label = -1;
    }
  }

  // A split of one head's context for a group of rows, in steps: begin(), attend_block() for each
  // block of the split, combine_warps(); by all threads.
  struct Task {
    int head, split, splits;
    bool ablated;         // the head is left out
    int first_row, rows;  // of the step: the queries
    int first_fresh;      // first row of the step that is of the same sequence
    int first_position;   // of row first_fresh
    __device__ __forceinline__ int fresh_rows() const { return first_row + rows - first_fresh; }
    // Of query r.
    __device__ __forceinline__ int position(int r) const {
      return first_position + (first_row - first_fresh) + r;
    }
    __device__ __forceinline__ int last_position() const { return position(rows - 1); }
  };

 private:
  // Wide heads have no registers left for the query.
  static constexpr bool kQueryInRegisters = kMaxSteps <= 8;

 public:
  struct Query {
    uint2 step[kQueryInRegisters ? kMaxSteps : 1];
  };
  // State of one warp's online softmax over its positions; base-2 logarithms.
  struct Softmax {
    float maximum;  // of query g / 2
    float sum;      // of query g / 2: this lane's columns
    // Of query q: [0] + [1] is dimension 16 t + g, [2] + [3] 16 t + g + 8.
    float output[kMaxSteps][4];
  };

  __device__ __forceinline__ void begin(const Task& task, Query& query, Softmax& state) {
    prepare(task);
    load_query(query);
    clear(state);
  }
  __device__ __forceinline__ void clear(Softmax& state) const {
    state.maximum = -INFINITY;
    state.sum = 0.0f;
#pragma unroll
    for (int t = 0; t < kMaxSteps; ++t)
      state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
  }

  // This warp's group of positions of one block, which has landed. The warps take the groups of one
  // block after the other round-robin.
  __device__ __forceinline__ void attend_block(const Task& task, int block, const Query& query,
                                               Softmax& state) {
    const int groups = c.p.kv_block_positions / kGroup;
    const int group = (c.warp - block * groups) & (plan::kConsumerWarps - 1);
    if (group >= groups) return;
    const int first = block * c.p.kv_block_positions + group * kGroup;
    if (first > task.last_position()) return;
    const int row_bytes = c.p.head_dim * 2;
    char* keys =
        static_cast<char*>(__cvta_shared_to_generic(c.ring.data())) + group * kGroup * row_bytes;
    attend_group(task, first, keys, keys + c.p.kv_block_positions * row_bytes, query, state);
  }

  // A group of positions from `first` on, whose keys and values lie in shared memory.
  __device__ __forceinline__ void attend_group(const Task& task, int first, char* keys,
                                               char* values, const Query& query, Softmax& state) {
    const int row_bytes = c.p.head_dim * 2;
    if (task.first_position < first + kGroup) insert_fresh(task, first, keys, values);

    float score[2][4] = {};  // of the group's halves
    multiply_keys(query, shared_address(keys + c.g * row_bytes) + c.q * 8, score);
    // Lanes point at the halves' rows, at the first and the second 8 dimensions of a step.
    const std::uint32_t rows =
        shared_address(values + (c.lane / 16 * 8 + c.lane % 8) * row_bytes) + c.lane / 8 % 2 * 16;
    uint4 value[kStepsAtOnce];
    load_values(rows, 0, value);
    std::uint32_t weights[2];
    const float correction = weigh(first, task, score, state, weights);
#pragma unroll
    for (int begin = 0; begin < kMaxSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_values(rows, begin, value);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        float(&output)[4] = state.output[begin + i];
        for (float& element : output) element *= correction;
        mma_16x8x16<T>(output, value[i], weights[0], weights[1]);
      }
    }
  }

  // Merges the eight warps' states of one task: each query's output if there is one split, else a
  // partial result for the combiners.
  __device__ __forceinline__ void combine_warps(const Task& task, const Softmax& state) {
    for (int r = 0; r < task.rows; ++r) {
      keep(state, r, states() + c.warp * (c.p.head_dim + 2));
      c.barrier();
      merge(task, task.first_row + r, states());
      c.barrier();
    }
  }

  // Query r's part of this warp's state: maximum, sum, and the output, not normalised.
  __device__ __forceinline__ void keep(const Softmax& state, int r, float* own) const {
    const float sum = warp_sum<4>(state.sum);
#pragma unroll
    for (int t = 0; t < kMaxSteps; ++t) {
      if (16 * t >= c.p.head_dim || c.q != r) continue;
      own[2 + 16 * t + c.g] = both_parts(state.output[t][0], state.output[t][1]);
      own[2 + 16 * t + c.g + 8] = both_parts(state.output[t][2], state.output[t][3]);
    }
    if (c.lane == 8 * r) {
      own[0] = state.maximum;
      own[1] = sum;
    }
  }

  // What the warps have kept of one row's query.
  __device__ __forceinline__ void merge(const Task& task, int row, const float* of_warp) {
    const int stride = c.p.head_dim + 2;
    float maximum = -INFINITY;
    for (int w = 0; w < plan::kConsumerWarps; ++w) maximum = fmaxf(maximum, of_warp[w * stride]);
    float factor[plan::kConsumerWarps];
    // Of an ablated head infinity, so that value / total is zero. With several splits the combiners
    // write zeros and look at no partial result.
    float total = task.ablated ? INFINITY : 0.0f;
#pragma unroll
    for (int w = 0; w < plan::kConsumerWarps; ++w) {
      factor[w] = exp2f(of_warp[w * stride] - maximum);
      total = fmaf(of_warp[w * stride + 1], factor[w], total);
    }
    float* partial =
        c.template lamport<float>(c.p.layout.partials) +
        static_cast<std::int64_t>((row * c.p.num_heads + task.head) * c.p.max_splits + task.split) *
            stride;
    const int first = task.head * c.p.head_dim;
    for (int dim = c.thread; dim < c.p.head_dim; dim += Block::kThreads) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < plan::kConsumerWarps; ++w)
        value = fmaf(of_warp[w * stride + 2 + dim], factor[w], value);
      if (task.splits == 1)
        lamport_store(c.template attention_output<T>(row, first + dim),
                      static_cast<T>(value / total));
      else
        lamport_store(partial + 2 + dim, value);
    }
    if (task.splits > 1 && c.thread < 2)
      lamport_store(partial + c.thread, c.thread == 0 ? maximum : total);
  }

 private:
  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kMaxSteps <= 5 ? kMaxSteps : 4;
  static_assert(kMaxSteps % kStepsAtOnce == 0);

  __device__ __forceinline__ Task task_of(int label, int step) const {
    const RowGroup& group = c.control->groups[label & 31];
    Task task;
    task.head = label >> 5 & 511;
    task.split = label >> 14 & 31;
    task.splits = label >> 19 & 31;
    task.ablated = is_ablated(label);
    task.first_row = group.first_row;
    task.rows = group.rows;
    task.first_fresh = group.sequence_first;
    task.first_position = c.control->rows[group.sequence_first].position + step;
    return task;
  }

  // ---------------------------------------------------------------- inputs of a task

  // In scratch: the warps' states of one query, then what enters the products, rounded.
  __device__ __forceinline__ float* states() const { return reinterpret_cast<float*>(c.scratch); }
  // [queries, 2, head_dim]: queries, and what rounding took from them.
  __device__ __forceinline__ T* queries() const {
    return reinterpret_cast<T*>(states() + plan::kConsumerWarps * (c.p.head_dim + 2));
  }
  // [fresh rows, 2, head_dim]: keys, and values.
  __device__ __forceinline__ T* fresh() const {
    return queries() + plan::kTaskQueries * 2 * c.p.head_dim;
  }

  // Cosine and sine for element `dim` (below rotary_dim) of a query or key.
  __device__ __forceinline__ float2 angle(int position, int dim) const {
    const int half = c.p.rotary_dim / 2;
    return __ldg(c.p.rotary + static_cast<std::int64_t>(position) * half +
                 (dim < half ? dim : dim - half));
  }

  // Element `index` of the task's inputs: queries first, then the fresh rows' keys and values.
  struct Input {
    const float* from = nullptr;   // null: there is none
    const float* other = nullptr;  // what rotation mixes it with; null: it is not rotated
    float sign = 0.0f;
    float2 angle;
    int kind = 0;  // 0 query, 1 key, 2 value
    int row = 0, dim = 0;
  };
  __device__ __forceinline__ Input input_of(const Task& task, int index) const {
    Input input;
    const int head_dim = c.p.head_dim;
    const int vector = c.vector_of(index);
    if (vector >= task.rows + 2 * task.fresh_rows()) return input;
    input.dim = index - vector * head_dim;
    input.kind = vector < task.rows ? 0 : 1 + (vector - task.rows) % 2;
    input.row = vector < task.rows ? vector : (vector - task.rows) / 2;
    const int of_step = input.kind == 0 ? task.first_row + input.row : task.first_fresh + input.row;
    const float* of_row = c.template lamport<const float>(c.p.layout.qkv) +
                          static_cast<std::int64_t>(of_step) * 3 * c.p.hidden_size;
    input.from = of_row + (task.head * 3 + input.kind) * head_dim + input.dim;
    if (input.kind < 2 && input.dim < c.p.rotary_dim) {
      const int half = c.p.rotary_dim / 2;
      input.angle = angle(task.first_position + (of_step - task.first_fresh), input.dim);
      input.other = input.dim < half ? input.from + half : input.from - half;
      input.sign = input.dim < half ? -1.0f : 1.0f;
    }
    return input;
  }

  // All threads.
  __device__ __forceinline__ void prepare(const Task& task) {
    constexpr int kBatch = Block::kInputsAtOnce;
    const int count = (task.rows + 2 * task.fresh_rows()) * c.p.head_dim;
#pragma unroll 1
    for (int first = c.thread; first < count; first += kBatch * Block::kThreads) {
      Input input[kBatch];
      std::uint32_t value[kBatch], other[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) input[i] = input_of(task, first + i * Block::kThreads);
      bool missing = true;
      while (missing) {
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          value[i] = other[i] = 0;
          if (input[i].from != nullptr) value[i] = lamport_load(input[i].from);
          if (input[i].other != nullptr) other[i] = lamport_load(input[i].other);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= value[i] == kNotReady || other[i] == kNotReady;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (input[i].from != nullptr)
          put(input[i], __uint_as_float(value[i]), __uint_as_float(other[i]));
    }
    c.barrier();
  }
  __device__ __forceinline__ void put(const Input& input, float value, float other) const {
    if (input.other != nullptr)
      value = fmaf(value, input.angle.x, __fmul_rn(input.sign * other, input.angle.y));
    if (input.kind > 0) {
      fresh()[(input.row * 2 + input.kind - 1) * c.p.head_dim + input.dim] = static_cast<T>(value);
      return;
    }
    // Scores come out as base-2 logarithms.
    value *= rsqrtf(static_cast<float>(c.p.head_dim)) * kLog2E;
    const float rounded = static_cast<float>(static_cast<T>(value));
    T* query = queries() + input.row * 2 * c.p.head_dim + input.dim;
    query[0] = static_cast<T>(value);
    query[c.p.head_dim] = static_cast<T>(isinf(rounded) ? 0.0f : value - rounded);
  }

  // Step t of operand row g. Rows of queries that are not there hold anything finite or not: their
  // results are not used.
  __device__ __forceinline__ uint2 query_step(int t) const {
    if (16 * t >= c.p.head_dim) return make_uint2(0, 0);
    return *reinterpret_cast<const uint2*>(queries() + c.g * c.p.head_dim + 16 * t + 4 * c.q);
  }
  __device__ __forceinline__ void load_query(Query& query) const {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int t = 0; t < kMaxSteps; ++t) query.step[t] = query_step(t);
    }
  }

  // ---------------------------------------------------------------- one block of positions

  // Puts keys and values of the step's own rows at positions `first` .. + 15 into the landed block,
  // those of the task's rows into the cache too, and clears the values behind the last: whatever
  // lies there must not reach a product.
  __device__ __forceinline__ void insert_fresh(const Task& task, int first, char* keys,
                                               char* values) {
    const int head_dim = c.p.head_dim;
    const int begin = max(first, task.first_position);
    const int end = min(first + kGroup, task.last_position() + 1);
    for (int position = begin; position < end; ++position) {
      const int row = position - task.first_position;
      const T* key = fresh() + row * 2 * head_dim;
      T* to_keys = reinterpret_cast<T*>(keys) + (position - first) * head_dim;
      T* to_values = reinterpret_cast<T*>(values) + (position - first) * head_dim;
      T* cache = nullptr;
      if (position >= task.position(0))
        cache = reinterpret_cast<T*>(c.ring.copied_from()) +
                position % c.p.kv_block_positions * head_dim;
      for (int dim = c.lane; dim < head_dim; dim += 32) {
        to_keys[dim] = key[dim];
        to_values[dim] = key[head_dim + dim];
        if (cache == nullptr) continue;
        cache[dim] = key[dim];
        cache[c.p.kv_block_positions * head_dim + dim] = key[head_dim + dim];
      }
    }
    for (int i = (end - first) * head_dim + c.lane; i < kGroup * head_dim; i += 32)
      reinterpret_cast<T*>(values)[i] = static_cast<T>(0.0f);
    fence_before_bulk_copy();
    __syncwarp();
  }

  // Steps of a group's values from step `begin` on, as operands A.
  __device__ __forceinline__ void load_values(std::uint32_t rows, int begin,
                                              uint4 (&value)[kStepsAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kStepsAtOnce; ++i) {
      value[i] = make_uint4(0, 0, 0, 0);
      if (16 * (begin + i) < c.p.head_dim)
        value[i] = load_matrix_4_transposed(rows + (begin + i) * 32);
    }
  }

  // score += query keys, for the two halves of a group; `keys` is where this lane's part of the
  // first half lies in shared memory.
  __device__ __forceinline__ void multiply_keys(const Query& query, std::uint32_t keys,
                                                float (&score)[2][4]) const {
    const int half_bytes = 8 * c.p.head_dim * 2;
#pragma unroll
    for (int begin = 0; begin < kMaxSteps; begin += kStepsAtOnce) {
      uint2 part[kStepsAtOnce], key[kStepsAtOnce][2];
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const int t = begin + i;
        if constexpr (kQueryInRegisters)
          part[i] = query.step[t];
        else
          part[i] = query_step(t);
        const bool is_there = 16 * t < c.p.head_dim;
        key[i][0] = load_shared_2_if(keys + t * 32, is_there);
        key[i][1] = load_shared_2_if(keys + half_bytes + t * 32, is_there);
      }
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const uint4 operand = make_uint4(part[i].x, 0, part[i].y, 0);
        mma_16x8x16<T>(score[0], operand, key[i][0].x, key[i][0].y);
        mma_16x8x16<T>(score[1], operand, key[i][1].x, key[i][1].y);
      }
    }
  }

  // From the scores of a group, which begins at position `first`, the weights of its values as
  // operand B. Updates the state but for its outputs; returns what these are to be multiplied by.
  __device__ __forceinline__ float weigh(int first, const Task& task, float (&score)[2][4],
                                         Softmax& state, std::uint32_t (&weights)[2]) const {
    const bool is_second_part = c.g % 2 != 0;
    const int position = task.position(c.g / 2);
    float maximum = state.maximum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& own = score[half][i];
        const float other = __shfl_xor_sync(kAllLanes, own, 4);
        own = is_second_part ? both_parts(other, own) : both_parts(own, other);
        if (first + 8 * half + 2 * c.q + i > position) own = -INFINITY;
        maximum = fmaxf(maximum, own);
      }
    }
    maximum = warp_max<4>(maximum);
    // A query that has seen nothing yet has no maximum to take away.
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    const float correction = exp2_approximately(state.maximum - base);
    state.maximum = maximum;
    state.sum = __fmul_rn(state.sum, correction);
    const bool is_valid = c.g / 2 < task.rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight0 = is_valid ? exp2_approximately(score[half][0] - base) : 0.0f;
      const float weight1 = is_valid ? exp2_approximately(score[half][1] - base) : 0.0f;
      state.sum += weight0 + weight1;
      weights[half] = pack<T>(weight0, weight1);
      const float2 rounded = unpack<T>(weights[half]);
      if (is_second_part) weights[half] = pack<T>(weight0 - rounded.x, weight1 - rounded.y);
    }
    return __shfl_sync(kAllLanes, correction, 8 * c.q);
  }

  Block& c;
};

}  // namespace clusterfusion::cuda::stream
