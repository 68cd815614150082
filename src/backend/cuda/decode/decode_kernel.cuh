// The streaming decode step: one block on each SM, all layers, one launch for many tokens.
//
// A producer thread streams weight chunks and KV blocks into a ring in shared memory; it needs no
// result of the computation to know what comes next, so memory never waits. Eight consumer warps
// multiply. Chunks are handed out by tickets; every output row is computed whole, in a fixed order,
// so the same input gives the same bits no matter who drew what.
//
// Phases of a layer, each followed by a grid barrier:
//   parallel residual    (1) LayerNorm, QKV, MLP up   (2) attention, MLP down, attention output
//   sequential residual  (1) LayerNorm, QKV   (2) attention, attention output
//                        (3) LayerNorm, MLP up   (4) MLP down
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/device/grid_barrier.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/registers.cuh"
#include "backend/cuda/device/ring.cuh"
#include "sampling/philox.hpp"

namespace clusterfusion::cuda {

using namespace device;

inline constexpr int kConsumerThreads = plan::kConsumerWarps * 32;
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kMaxChunkSlots = 512;

enum RingKind : int { kQkv, kMlpUp, kAttention, kMlpDown, kAttentionOut, kLmHead, kPhaseEnd };

// Shared memory: control, activations, sums, ring. The sizes are those of DecodePlan.
struct SharedControl {
  RingControl ring;
  float reduce[2][plan::kConsumerWarps];
  Candidate candidate[plan::kConsumerWarps];
  int chunk_of_slot[kMaxChunkSlots];
  int token;
  int split_is_last;
  // Completes when a step after the first begins: what the step before has written to the KV cache
  // may now be streamed.
  std::uint64_t step_begun;
};
static_assert(sizeof(SharedControl) <= plan::kControlBytes);

// Two floats, rounded, packed with the first in the low half.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  if constexpr (MmaInput<T>::kIsHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair) {
  if constexpr (MmaInput<T>::kIsHalf) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  }
}

__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::gelu_erf: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh: {
      const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.0f + tanhf(inner));
    }
    case Activation::gelu_quick: return x / (1.0f + expf(-1.702f * x));
    case Activation::relu: return fmaxf(x, 0.0f);
    case Activation::relu_squared: return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::mish: return x * tanhf(x > 20.0f ? x : log1pf(expf(x)));
    case Activation::tanh: return tanhf(x);
    case Activation::sigmoid: return 1.0f / (1.0f + expf(-x));
    case Activation::identity: return x;
  }
  return x;
}

// Activations of one matrix as tensor-core fragments: what this lane's slice needs.
template <int kMaxIterations>
struct Fragments {
  uint4 value[kMaxIterations];
};

template <typename T, int kMaxIterations, int kMaxHeadSteps>
class DecodeStep {
 public:
  using Frag = Fragments<kMaxIterations>;

  __device__ __forceinline__ DecodeStep(const DecodeParams& params, char* shared)
      : p(params),
        control(reinterpret_cast<SharedControl*>(shared)),
        normed(reinterpret_cast<T*>(shared + plan::kControlBytes)),
        sums(reinterpret_cast<float*>(shared + plan::kControlBytes) +
             (params.hidden_size + 31) / 32 * 32),
        ring_data(reinterpret_cast<char*>(sums + params.sum_slots)),
        thread(threadIdx.x),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        q(threadIdx.x % 4) {}

  __device__ __forceinline__ void run() {
    if (thread == 0) {
      ring_init(&control->ring, p.stages, plan::kConsumerWarps);
      mbarrier_init(&control->step_begun, 1);
      mbarrier_fence_init();
    }
    __syncthreads();
    if (thread >= kConsumerThreads) {
      give_up_registers<kProducerRegisters>();
      if (thread == kConsumerThreads) produce();
    } else {
      take_registers<kConsumerRegisters>();
      consume();
    }
  }

 private:
  // ---------------------------------------------------------------- producer

  __device__ __forceinline__ void push_chunk(RingProducer& ring, RingKind kind,
                                             const StreamedMatrix& matrix, const char* weights,
                                             int chunk) {
    const int first_row = chunk * matrix.rows_per_chunk;
    const int rows = min(matrix.rows_per_chunk, matrix.rows - first_row);
    ring.push({kind, chunk, 0, 0},
              weights + static_cast<std::int64_t>(first_row) * matrix.row_bytes,
              rows * matrix.row_bytes);
  }

  __device__ __forceinline__ void push_attention(RingProducer& ring, int ticket, int layer,
                                                 int position) {
    const plan::AttentionSplits splits = splits_at(position);
    const int head = ticket / splits.splits;
    const int first = ticket % splits.splits * splits.blocks_per_split;
    const int end = min(first + splits.blocks_per_split, splits.blocks);
    for (int block = first; block < end; ++block) {
      ring.push({kAttention, ticket, block, block + 1 == end}, kv_block(layer, head, block),
                p.kv_block_bytes);
    }
  }

  // Draws tickets of one phase until they run out; `push` gets each ticket. The next ticket is
  // asked for while this one is pushed.
  template <typename Push>
  __device__ __forceinline__ static void draw(std::uint32_t* counter, int count, Push&& push) {
    int ticket = static_cast<int>(atomicAdd(counter, 1u));
    while (ticket < count) {
      const int next = static_cast<int>(atomicAdd(counter, 1u));
      push(ticket);
      ticket = next;
    }
  }

  __device__ __forceinline__ void produce() {
    RingProducer ring{&control->ring, ring_data, p.stages, p.stage_bytes, p.max_in_flight};
    // Every phase of every step has a counter of its own: this producer may be a step ahead of
    // another that has not drawn its last ticket yet.
    std::uint32_t* counter = p.scratch.tickets;
    for (int step = 0; step < p.steps; ++step) {
      const int position = p.first_position + step;
      const int attention_tickets = p.num_heads * splits_at(position).splits;
      const auto phase = [&](int count, auto&& push) {
        draw(counter++, count, push);
        ring.push({kPhaseEnd, 0, 0, 0}, nullptr, 0);
      };
      for (int layer = 0; layer < p.num_layers; ++layer) {
        const StreamedLayer& weights = p.layers[layer];
        const auto up = [&](int t) { push_chunk(ring, kMlpUp, p.mlp_up, weights.mlp_up, t); };
        const auto down = [&](int t) {
          push_chunk(ring, kMlpDown, p.mlp_down, weights.mlp_down, t);
        };
        const int up_with_qkv = p.parallel_residual ? p.mlp_up.chunks : 0;
        phase(p.qkv.chunks + up_with_qkv, [&](int t) {
          if (t < p.qkv.chunks)
            push_chunk(ring, kQkv, p.qkv, weights.qkv, t);
          else
            up(t - p.qkv.chunks);
        });
        if (layer == 0 && step > 0) {
          mbarrier_wait(&control->step_begun, (step - 1) & 1);
          fence_before_bulk_copy();
        }
        const int down_with_attention = p.parallel_residual ? p.mlp_down.chunks : 0;
        phase(attention_tickets + down_with_attention + p.attention_out.chunks, [&](int t) {
          if (t < attention_tickets)
            push_attention(ring, t, layer, position);
          else if ((t -= attention_tickets) < down_with_attention)
            down(t);
          else
            push_chunk(ring, kAttentionOut, p.attention_out, weights.attention_out,
                       t - down_with_attention);
        });
        if (p.parallel_residual) continue;
        phase(p.mlp_up.chunks, up);
        phase(p.mlp_down.chunks, down);
      }
      if (step < p.first_scored_step) continue;
      phase(p.lm_head.chunks,
            [&](int t) { push_chunk(ring, kLmHead, p.lm_head, p.lm_head_weight, t); });
    }
  }

  // ---------------------------------------------------------------- consumers

  // The compiler may not know these any more. Else it computes the addresses of all phases once, in
  // front of the loop over layers, and spills them.
  __device__ __forceinline__ void forget_indices() {
    asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(g), "+r"(q));
  }

  __device__ __forceinline__ void consumer_barrier() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory");
  }

  __device__ __forceinline__ void grid_barrier() {
    consumer_barrier();
    arrivals_target += gridDim.x;
    if (thread == 0) {
      counter_add_release(p.scratch.arrivals, 1);
      counter_wait(p.scratch.arrivals, arrivals_target);
    }
    consumer_barrier();
  }

  __device__ __forceinline__ plan::AttentionSplits splits_at(int position) const {
    return plan::attention_splits(position + 1, p.kv_block_positions, p.num_heads, gridDim.x);
  }

  __device__ __forceinline__ char* kv_block(int layer, int head, int block) const {
    const int first = block * p.kv_block_positions;
    const int block_in_page = first % plan::kKvPagePositions / p.kv_block_positions;
    return p.kv_pages[first / plan::kKvPagePositions] +
           static_cast<std::int64_t>(layer * p.num_heads + head) * p.kv_head_bytes +
           static_cast<std::int64_t>(block_in_page) * p.kv_block_bytes;
  }

  // Element offset of this lane's first 8 values in a row segment of its warp.
  __device__ __forceinline__ int lane_column(const StreamedMatrix& matrix) const {
    return (warp & (matrix.segments - 1)) * matrix.segment_columns +
           (g & ((1 << matrix.slices_log2) - 1)) * matrix.slice_columns + q * 8;
  }

  // A row of 16-bit activations in global memory as fragments; written by other SMs, so from L2.
  __device__ __forceinline__ void load_activations(const StreamedMatrix& matrix, const void* source,
                                                   Frag& fragments) const {
    const auto* first =
        reinterpret_cast<const uint4*>(static_cast<const T*>(source) + lane_column(matrix));
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i)
      if (i < matrix.iterations) fragments.value[i] = __ldcg(first + i * 4);
  }

  // This thread's pairs of a vector of hidden_size elements: pair j starts at element(j).
  __device__ __forceinline__ int element(int j) const {
    return 2 * (thread + kConsumerThreads * j);
  }
  __device__ __forceinline__ bool holds(int j) const { return element(j) < p.hidden_size; }

  // LayerNorm parameters of this thread's elements, fetched before a barrier, used behind it.
  struct Norm {
    std::uint32_t weight[kMaxIterations], bias[kMaxIterations];
  };
  __device__ __forceinline__ void load_norm(const void* weight, const void* bias,
                                            Norm& norm) const {
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      if (!holds(j)) continue;
      norm.weight[j] = __ldg(static_cast<const std::uint32_t*>(weight) + element(j) / 2);
      norm.bias[j] = __ldg(static_cast<const std::uint32_t*>(bias) + element(j) / 2);
    }
  }

  __device__ __forceinline__ float block_sum(float value, int which) {
    value = warp_sum(value);
    if (lane == 0) control->reduce[which][warp] = value;
    consumer_barrier();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < plan::kConsumerWarps; ++w) total += control->reduce[which][w];
    return total;
  }

  struct Moments {
    float mean, inverse_deviation;
  };
  // Mean and deviation of x in two passes over registers: safe for any mean.
  __device__ __forceinline__ Moments moments() {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j)
      if (holds(j)) sum += x[j].x + x[j].y;
    const float mean = block_sum(sum, 0) / p.hidden_size;
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      if (!holds(j)) continue;
      squares = fmaf(x[j].x - mean, x[j].x - mean, squares);
      squares = fmaf(x[j].y - mean, x[j].y - mean, squares);
    }
    const float variance = block_sum(squares, 1) / p.hidden_size;
    return {mean, rsqrtf(variance + p.layer_norm_eps)};
  }

  // Writes normalised x, rounded, to one of the two inputs in shared memory.
  __device__ __forceinline__ void normalise(const Moments& moments, const Norm& norm, int input) {
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      if (!holds(j)) continue;
      const float2 weight = unpack<T>(norm.weight[j]);
      const float2 bias = unpack<T>(norm.bias[j]);
      const float first = (x[j].x - moments.mean) * moments.inverse_deviation;
      const float second = (x[j].y - moments.mean) * moments.inverse_deviation;
      reinterpret_cast<std::uint32_t*>(normed + input * p.hidden_size)[element(j) / 2] =
          pack<T>(fmaf(first, weight.x, bias.x), fmaf(second, weight.y, bias.y));
    }
  }

  // One of the normalised inputs as fragments; a barrier lies behind normalise().
  __device__ __forceinline__ void load_normed(const StreamedMatrix& matrix, int input,
                                              Frag& fragments) const {
    const auto* first =
        reinterpret_cast<const uint4*>(normed + input * p.hidden_size + lane_column(matrix));
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i)
      if (i < matrix.iterations) fragments.value[i] = first[i * 4];
  }

  // x += the sums that the phase before has left in global memory; all loads first.
  __device__ __forceinline__ void add_deltas(const float* first, const float* second) {
    float2 delta[kMaxIterations], other[kMaxIterations];
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      delta[j] = other[j] = make_float2(0.0f, 0.0f);
      if (!holds(j)) continue;
      delta[j] = __ldcg(reinterpret_cast<const float2*>(first + element(j)));
      if (second != nullptr)
        other[j] = __ldcg(reinterpret_cast<const float2*>(second + element(j)));
    }
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      x[j].x += delta[j].x + other[j].x;
      x[j].y += delta[j].y + other[j].y;
    }
  }

  // What the layer before still owes x.
  __device__ __forceinline__ void add_layer() {
    if (p.parallel_residual)
      add_deltas(p.scratch.delta_attention, p.scratch.delta_mlp);
    else
      add_deltas(p.scratch.delta_mlp, nullptr);
  }

  // Multiplies all chunks of `kind` at the ring's head and hands each row's sum, bias included, to
  // `finish`. `bias` may be null.
  template <typename Finish>
  __device__ __forceinline__ void multiply(RingKind kind, const StreamedMatrix& matrix,
                                           const Frag& fragments, const float* bias,
                                           Finish&& finish) {
    forget_indices();
    const int row_in_unit = g >> matrix.slices_log2;
    const int segment = warp & (matrix.segments - 1);
    const int offset = row_in_unit * matrix.row_bytes + lane_column(matrix) * 2;
    const bool writes = (lane & ((4 << matrix.slices_log2) - 1)) == 0;
    const int max_slots =
        min(kMaxChunkSlots, p.sum_slots / (matrix.rows_per_chunk * matrix.segments));
    // The row that this thread will finish first, so that its bias can be fetched ahead.
    const int early_slot = thread / matrix.rows_per_chunk;
    float early_bias = 0.0f;
    int slot = 0;
    while (true) {
      const RingLabel label = ring.wait();
      if (label.kind != kind) break;
      if (slot == early_slot && bias != nullptr) {
        const int row = label.index * matrix.rows_per_chunk + thread - slot * matrix.rows_per_chunk;
        if (row < matrix.rows) early_bias = __ldg(bias + row);
      }
      for (int unit = warp; unit < matrix.units_per_chunk; unit += plan::kConsumerWarps) {
        const int first_row = (unit >> matrix.segments_log2) * matrix.unit_rows;
        const std::uint32_t address =
            shared_address(ring.current() + first_row * matrix.row_bytes + offset);
        float value = dot(address, matrix.iterations, fragments);
        // Over the slices of a row: 4 x slices lanes.
        value += __shfl_xor_sync(kAllLanes, value, 1);
        value += __shfl_xor_sync(kAllLanes, value, 2);
        if (matrix.slices_log2 > 0) value += __shfl_xor_sync(kAllLanes, value, 4);
        if (matrix.slices_log2 > 1) value += __shfl_xor_sync(kAllLanes, value, 8);
        if (matrix.slices_log2 > 2) value += __shfl_xor_sync(kAllLanes, value, 16);
        if (writes) {
          const int row = slot * matrix.rows_per_chunk + first_row + row_in_unit;
          sums[(row << matrix.segments_log2) + segment] = value;
        }
      }
      if (thread == 0) control->chunk_of_slot[slot] = label.index;
      ring.release(lane);
      if (++slot == max_slots) {
        finish_rows(matrix, slot, bias, early_bias, finish);
        slot = 0;
      }
    }
    if (slot > 0) finish_rows(matrix, slot, bias, early_bias, finish);
  }

  // This lane's share of a unit. The four words of a lane's 16 bytes of weights are operand A as
  // they stand: words 0 and 2 in row g, words 1 and 3 in row g + 8. So the activations, operand B,
  // are words 0 and 2 for a first product, of which rows 0 to 7 count, and words 1 and 3 for a
  // second, of which rows 8 to 15 do. In both the diagonal counts: row g (+ 8), column g.
  __device__ __forceinline__ float dot(std::uint32_t address, int iterations,
                                       const Frag& fragments) const {
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      if (i >= iterations) break;
      uint4 weight;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(weight.x), "=r"(weight.y), "=r"(weight.z), "=r"(weight.w)
                   : "r"(address + i * 64));
      mma_16x8x16<T>(even, weight, fragments.value[i].x, fragments.value[i].z);
      mma_16x8x16<T>(odd, weight, fragments.value[i].y, fragments.value[i].w);
    }
    if (q != g / 2) return 0.0f;
    return g % 2 ? even[1] + odd[3] : even[0] + odd[2];
  }

  template <typename Finish>
  __device__ __forceinline__ void finish_rows(const StreamedMatrix& matrix, int slots,
                                              const float* bias, float early_bias,
                                              Finish&& finish) {
    consumer_barrier();
    for (int i = thread; i < slots * matrix.rows_per_chunk; i += kConsumerThreads) {
      const int slot = i / matrix.rows_per_chunk;
      const int row =
          control->chunk_of_slot[slot] * matrix.rows_per_chunk + i - slot * matrix.rows_per_chunk;
      if (row >= matrix.rows) continue;
      float value = i == thread ? early_bias : bias != nullptr ? __ldg(bias + row) : 0.0f;
      for (int segment = 0; segment < matrix.segments; ++segment)
        value += sums[(i << matrix.segments_log2) + segment];
      finish(row, value);
    }
    consumer_barrier();
  }

  // ---------------------------------------------------------------- attention

  // Query, key and value of the current position for one head, in shared memory: first as they come
  // from the QKV matrix, then the query rotated and scaled, the key rotated, all rounded.
  struct HeadInputs {
    float* raw;  // [3, head_dim]
    T* ready;    // [3, head_dim]
  };
  __device__ __forceinline__ HeadInputs head_inputs() const {
    float* raw = sums + plan::kConsumerWarps * (p.head_dim + 2);  // behind the warps' states
    return {raw, reinterpret_cast<T*>(raw + 3 * p.head_dim)};
  }

  // All threads: one trip to global memory, two barriers.
  __device__ __forceinline__ void prepare_head(int head, int position) {
    const HeadInputs inputs = head_inputs();
    const float* qkv = p.scratch.qkv + static_cast<std::int64_t>(head) * 3 * p.head_dim;
    const int half = p.rotary_dim / 2;
    const float2* angles = p.rotary + static_cast<std::int64_t>(position) * half;
    constexpr int kRounds = (3 * 16 * kMaxHeadSteps + kConsumerThreads - 1) / kConsumerThreads;
    float2 angle[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int i = thread + round * kConsumerThreads;
      const int dim = i % p.head_dim;
      angle[round] = make_float2(1.0f, 0.0f);
      if (i < 2 * p.head_dim && dim < p.rotary_dim)
        angle[round] = __ldg(angles + (dim < half ? dim : dim - half));
      if (i < 3 * p.head_dim) inputs.raw[i] = __ldcg(qkv + i);
    }
    consumer_barrier();
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * 1.4426950408889634f;
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
      inputs.ready[i] = static_cast<T>(i < p.head_dim ? value * scale : value);
    }
    consumer_barrier();
  }

  // State of one warp's online softmax over its positions of one head; base-2 logarithms.
  struct Softmax {
    float maximum;                   // the same in all lanes
    float sum;                       // lanes 0 to 3: each its own columns
    float output[kMaxHeadSteps][4];  // lanes q = 0: [0] is dimension 16 t + g, [2] 16 t + g + 8
  };

  __device__ __forceinline__ void attend(int layer, int position) {
    forget_indices();
    const plan::AttentionSplits splits = splits_at(position);
    std::uint32_t query[kMaxHeadSteps][2];
    Softmax state;
    bool begun = false;
    while (true) {
      const RingLabel label = ring.wait();
      if (label.kind != kAttention) break;
      const int head = label.index / splits.splits;
      if (!begun) {
        prepare_head(head, position);
        load_query(query);
        state.maximum = -INFINITY;
        state.sum = 0.0f;
#pragma unroll
        for (int t = 0; t < kMaxHeadSteps; ++t)
          state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
        begun = true;
      }
      attend_block(layer, head, label.part, position, query, state);
      ring.release(lane);
      if (label.last) {
        combine_warps(head, label.index % splits.splits, splits.splits, state);
        begun = false;
      }
    }
    if (splits.splits > 1) splits_target += splits.splits;
    heads_target += p.num_heads;
  }

  // Row 0 of operand A; the other rows are zero.
  __device__ __forceinline__ void load_query(std::uint32_t (&query)[kMaxHeadSteps][2]) const {
    const T* ready = head_inputs().ready;
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      query[t][0] = query[t][1] = 0;
      if (g != 0 || 16 * t >= p.head_dim) continue;
      const uint2 four = *reinterpret_cast<const uint2*>(ready + 16 * t + 4 * q);
      query[t][0] = four.x;
      query[t][1] = four.y;
    }
  }

  // This warp's groups of 8 positions of one block.
  __device__ __forceinline__ void attend_block(int layer, int head, int block, int position,
                                               const std::uint32_t (&query)[kMaxHeadSteps][2],
                                               Softmax& state) {
    const int groups = p.kv_block_positions / 8;
    const int group = (warp - block * groups) & (plan::kConsumerWarps - 1);
    if (group >= groups) return;
    const int first = block * p.kv_block_positions + group * 8;
    if (first > position) return;
    const int row_bytes = p.head_dim * 2;
    char* keys = ring.current() + group * 8 * row_bytes;
    char* values = keys + p.kv_block_positions * row_bytes;
    if (position < first + 8) insert_current(layer, head, block, group, position, keys, values);

    float score[4] = {};
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      if (16 * t >= p.head_dim) continue;
      const uint2 key = *reinterpret_cast<const uint2*>(keys + g * row_bytes + t * 32 + q * 8);
      mma_16x8x16<T>(score, make_uint4(query[t][0], 0, query[t][1], 0), key.x, key.y);
    }
    // Lanes 0 to 3 hold the scores of positions first + 2q and first + 2q + 1.
    const float score0 = first + 2 * q <= position ? score[0] : -INFINITY;
    const float score1 = first + 2 * q + 1 <= position ? score[1] : -INFINITY;
    float maximum = warp_max<4>(fmaxf(score0, score1));
    maximum = fmaxf(state.maximum, __shfl_sync(kAllLanes, maximum, 0));
    const float correction = exp2f(state.maximum - maximum);
    state.maximum = maximum;
    const float weight0 = g == 0 ? exp2f(score0 - maximum) : 0.0f;
    const float weight1 = g == 0 ? exp2f(score1 - maximum) : 0.0f;
    state.sum = state.sum * correction + weight0 + weight1;
    const std::uint32_t weights = pack<T>(weight0, weight1);
    const std::uint32_t row = shared_address(values + (lane % 8) * row_bytes + (lane / 8 % 2) * 16);
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      if (16 * t >= p.head_dim) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) state.output[t][i] *= correction;
      std::uint32_t upper, lower;
      load_matrix_2_transposed(upper, lower, row + t * 32);
      mma_16x8x8<T>(state.output[t], upper, lower, weights);
    }
  }

  // Puts the current position's key and value into the landed block and into the cache, and clears
  // the values behind it in this group: whatever lies there must not reach a product.
  __device__ __forceinline__ void insert_current(int layer, int head, int block, int group,
                                                 int position, char* keys, char* values) {
    const int row = position % 8;
    char* cached = kv_block(layer, head, block);
    T* cached_key = reinterpret_cast<T*>(cached) + (group * 8 + row) * p.head_dim;
    T* cached_value = cached_key + p.kv_block_positions * p.head_dim;
    const T* ready = head_inputs().ready;
    for (int dim = lane; dim < p.head_dim; dim += 32) {
      const T key = ready[p.head_dim + dim];
      const T value = ready[2 * p.head_dim + dim];
      reinterpret_cast<T*>(keys)[row * p.head_dim + dim] = key;
      reinterpret_cast<T*>(values)[row * p.head_dim + dim] = value;
      cached_key[dim] = key;
      cached_value[dim] = value;
      for (int later = row + 1; later < 8; ++later)
        reinterpret_cast<T*>(values)[later * p.head_dim + dim] = static_cast<T>(0.0f);
    }
    fence_before_bulk_copy();
    __syncwarp();
  }

  // Merges the eight warps' states of one split; the last split of a head merges the splits.
  __device__ __forceinline__ void combine_warps(int head, int split, int num_splits,
                                                const Softmax& state) {
    const int stride = p.head_dim + 2;
    float* own = sums + warp * stride;
#pragma unroll
    for (int t = 0; t < kMaxHeadSteps; ++t) {
      if (16 * t >= p.head_dim || q != 0) continue;
      own[2 + 16 * t + g] = state.output[t][0];
      own[2 + 16 * t + g + 8] = state.output[t][2];
    }
    const float sum = warp_sum<4>(state.sum);
    if (lane == 0) {
      own[0] = state.maximum;
      own[1] = sum;
    }
    consumer_barrier();
    float maximum = -INFINITY;
    for (int w = 0; w < plan::kConsumerWarps; ++w) maximum = fmaxf(maximum, sums[w * stride]);
    float total = 0.0f;
    for (int w = 0; w < plan::kConsumerWarps; ++w)
      total += sums[w * stride + 1] * exp2f(sums[w * stride] - maximum);
    T* result = static_cast<T*>(p.scratch.attention) + head * p.head_dim;
    float* split_output = p.scratch.split_output +
                          (static_cast<std::int64_t>(head) * num_splits + split) * p.head_dim;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads) {
      float value = 0.0f;
      for (int w = 0; w < plan::kConsumerWarps; ++w)
        value += sums[w * stride + 2 + dim] * exp2f(sums[w * stride] - maximum);
      if (num_splits == 1)
        result[dim] = static_cast<T>(value / total);
      else
        split_output[dim] = value;
    }
    if (num_splits > 1) {
      if (thread == 0) {
        float* split_state = p.scratch.split_state + (head * num_splits + split) * 2;
        split_state[0] = maximum;
        split_state[1] = total;
      }
      if (!last_of_head(head, num_splits)) return;
      combine_splits(head, num_splits, result);
    }
    consumer_barrier();
    if (thread == 0) {
      __threadfence();
      counter_add_release(p.scratch.heads_done, 1);
    }
  }

  // Whether this block has finished the last of a head's splits. All consumers get the answer.
  __device__ __forceinline__ bool last_of_head(int head, int num_splits) {
    __threadfence();
    consumer_barrier();
    if (thread == 0) {
      const std::uint32_t before = atomicAdd(p.scratch.splits_done + head, 1u);
      control->split_is_last = before + 1 == splits_target + num_splits;
      __threadfence();
    }
    consumer_barrier();
    return control->split_is_last;
  }

  __device__ __forceinline__ void combine_splits(int head, int num_splits, T* result) {
    const float* states = p.scratch.split_state + head * num_splits * 2;
    const float* outputs =
        p.scratch.split_output + static_cast<std::int64_t>(head) * num_splits * p.head_dim;
    float maximum = -INFINITY;
    for (int s = 0; s < num_splits; ++s) maximum = fmaxf(maximum, __ldcg(states + 2 * s));
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads) {
      float total = 0.0f, value = 0.0f;
      for (int s = 0; s < num_splits; ++s) {
        const float factor = exp2f(__ldcg(states + 2 * s) - maximum);
        total = fmaf(__ldcg(states + 2 * s + 1), factor, total);
        value =
            fmaf(__ldcg(outputs + static_cast<std::int64_t>(s) * p.head_dim + dim), factor, value);
      }
      result[dim] = static_cast<T>(value / total);
    }
  }

  // ---------------------------------------------------------------- the step

  __device__ __forceinline__ void end_phase() {
    ring.wait();
    ring.release(lane);
    grid_barrier();
  }

  __device__ __forceinline__ void multiply_qkv(const StreamedLayer& layer, const Frag& fragments) {
    multiply(kQkv, p.qkv, fragments, layer.qkv_bias,
             [&](int row, float value) { p.scratch.qkv[row] = value; });
  }
  __device__ __forceinline__ void multiply_up(const StreamedLayer& layer, const Frag& fragments) {
    multiply(kMlpUp, p.mlp_up, fragments, layer.mlp_up_bias, [&](int row, float value) {
      static_cast<T*>(p.scratch.mlp)[row] = static_cast<T>(activate(p.activation, value));
    });
  }
  __device__ __forceinline__ void multiply_down(const StreamedLayer& layer, const Frag& fragments) {
    multiply(kMlpDown, p.mlp_down, fragments, layer.mlp_down_bias,
             [&](int row, float value) { p.scratch.delta_mlp[row] = value; });
  }

  __device__ __forceinline__ void wait_for_heads() {
    if (thread == 0) counter_wait(p.scratch.heads_done, heads_target);
    consumer_barrier();
  }

  __device__ __forceinline__ void attention_phase(const StreamedLayer& layer, int index,
                                                  int position) {
    forget_indices();
    Frag fragments;
    if (p.parallel_residual) load_activations(p.mlp_down, p.scratch.mlp, fragments);
    attend(index, position);
    if (p.parallel_residual) multiply_down(layer, fragments);
    if (ring.wait().kind == kAttentionOut) {
      wait_for_heads();
      load_activations(p.attention_out, p.scratch.attention, fragments);
      multiply(kAttentionOut, p.attention_out, fragments, layer.attention_out_bias,
               [&](int row, float value) { p.scratch.delta_attention[row] = value; });
    }
  }

  __device__ __forceinline__ void consume() {
    ring = RingConsumer{&control->ring, ring_data, p.stages, p.stage_bytes};
    int token = -1;
    for (int step = 0; step < p.steps; ++step) {
      if (thread == 0 && step > 0) mbarrier_arrive(&control->step_begun);
      if (step < p.given_count) token = p.given_tokens[step];
      const int position = p.first_position + step;
      embed(token);
      Norm norm;
      load_norm(p.layers[0].input_norm_weight, p.layers[0].input_norm_bias, norm);
      for (int index = 0; index < p.num_layers; ++index) layer_step(index, position, norm);
      if (step < p.first_scored_step) {
        if (thread == 0 && blockIdx.x == 0) p.chosen[step] = -1;
        continue;
      }
      token = score(step, position, norm);
      if (thread == 0 && blockIdx.x == 0) p.chosen[step] = token;
    }
  }

  __device__ __forceinline__ void embed(int token) {
    // A token that was not chosen (a NaN among the logits) is reported by the host; stay in bounds.
    const auto* row = reinterpret_cast<const std::uint32_t*>(
        static_cast<const T*>(p.embedding) +
        static_cast<std::int64_t>(max(token, 0)) * p.hidden_size);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      x[j] = make_float2(0.0f, 0.0f);
      if (holds(j)) x[j] = unpack<T>(__ldg(row + element(j) / 2));
    }
  }

  // One layer. `norm` holds its first LayerNorm's parameters, and on return the next one's: they
  // are fetched before the last barrier.
  __device__ __forceinline__ void layer_step(int index, int position, Norm& norm) {
    forget_indices();
    const StreamedLayer& layer = p.layers[index];
    Frag fragments;
    {
      Norm post_norm;
      if (p.parallel_residual) load_norm(layer.post_norm_weight, layer.post_norm_bias, post_norm);
      if (index > 0) add_layer();
      const Moments m = moments();
      normalise(m, norm, 0);
      if (p.parallel_residual) normalise(m, post_norm, 1);
      consumer_barrier();
    }
    load_normed(p.qkv, 0, fragments);
    multiply_qkv(layer, fragments);
    if (p.parallel_residual) {
      load_normed(p.mlp_up, 1, fragments);
      multiply_up(layer, fragments);
    }
    end_phase();
    attention_phase(layer, index, position);
    if (!p.parallel_residual) mlp_phases(layer);
    const bool last = index + 1 == p.num_layers;
    load_norm(last ? p.final_norm_weight : p.layers[index + 1].input_norm_weight,
              last ? p.final_norm_bias : p.layers[index + 1].input_norm_bias, norm);
    end_phase();
  }

  // The second half of a layer with sequential residual, up to but not with its last barrier.
  __device__ __forceinline__ void mlp_phases(const StreamedLayer& layer) {
    Norm norm;
    Frag fragments;
    load_norm(layer.post_norm_weight, layer.post_norm_bias, norm);
    end_phase();
    add_deltas(p.scratch.delta_attention, nullptr);
    normalise(moments(), norm, 1);
    consumer_barrier();
    load_normed(p.mlp_up, 1, fragments);
    multiply_up(layer, fragments);
    end_phase();
    load_activations(p.mlp_down, p.scratch.mlp, fragments);
    multiply_down(layer, fragments);
  }

  // ---------------------------------------------------------------- choosing the token

  __device__ __forceinline__ static bool better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
  }

  // A logit that is not finite beats everything, with token -1.
  __device__ __forceinline__ Candidate candidate(int token, float logit, int position) const {
    if (!isfinite(logit)) return {INFINITY, -1};
    if (p.temperature == 0.0f) return {logit, token};
    const PhiloxCounter words = noise_words(p.seed, position + 1, token / 4);
    return {logit / p.temperature + gumbel_from(words[token % 4]), token};
  }

  __device__ __forceinline__ Candidate best_of_warp(Candidate best) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Candidate other{__shfl_xor_sync(kAllLanes, best.score, offset),
                            __shfl_xor_sync(kAllLanes, best.token, offset)};
      if (better(other, best)) best = other;
    }
    return best;
  }

  // Final LayerNorm, LM head, and the choice of the next token, which every SM makes for itself.
  __device__ __forceinline__ int score(int step, int position, const Norm& norm) {
    Frag fragments;
    add_layer();
    normalise(moments(), norm, 0);
    consumer_barrier();
    load_normed(p.lm_head, 0, fragments);
    Candidate best{-INFINITY, 0x7fffffff};
    float* logits =
        p.logits == nullptr
            ? nullptr
            : p.logits + static_cast<std::int64_t>(step - p.first_scored_step) * p.vocab_size;
    multiply(kLmHead, p.lm_head, fragments, nullptr, [&](int row, float value) {
      if (logits != nullptr) logits[row] = value;
      const Candidate here = candidate(row, value, position);
      if (better(here, best)) best = here;
    });
    best = best_of_warp(best);
    if (lane == 0) control->candidate[warp] = best;
    consumer_barrier();
    Candidate* candidates = p.scratch.candidates + (step & 1) * gridDim.x;
    if (thread == 0) {
      for (int w = 1; w < plan::kConsumerWarps; ++w)
        if (better(control->candidate[w], best)) best = control->candidate[w];
      candidates[blockIdx.x] = best;
    }
    end_phase();
    if (warp == 0) {
      best = {-INFINITY, 0x7fffffff};
      for (int i = lane; i < gridDim.x; i += 32) {
        const Candidate other{__ldcg(&candidates[i].score), __ldcg(&candidates[i].token)};
        if (better(other, best)) best = other;
      }
      best = best_of_warp(best);
      if (lane == 0) control->token = best.token;
    }
    consumer_barrier();
    return control->token;
  }

  const DecodeParams& p;
  SharedControl* control;
  T* normed;    // [2, hidden]: the two normalised inputs of a layer
  float* sums;  // [sum_slots]: partial sums of rows; states of attention
  char* ring_data;
  int thread, warp, lane, g, q;
  RingConsumer ring{};
  // The residual stream, the same in every block: this thread's pairs of elements.
  float2 x[kMaxIterations];
  std::uint32_t arrivals_target = 0;  // where the counters stand after what this block has seen
  std::uint32_t heads_target = 0;
  std::uint32_t splits_target = 0;
};

template <typename T, int kMaxIterations, int kMaxHeadSteps>
__global__ void __launch_bounds__(kDecodeBlockThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) char shared[];
  DecodeStep<T, kMaxIterations, kMaxHeadSteps>(params, shared).run();
}

}  // namespace clusterfusion::cuda
