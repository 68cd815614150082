// The streaming decode step: one block on each SM, all layers, one launch for many tokens.
//
// Roles of a block's warps
//   8 consumers        multiply what has landed in the ring, on the tensor cores
//   1 work scheduler   announces which weight chunks and KV blocks come into the ring; it needs no
//                      result to know that, so memory never waits
//   1 producer         copies them with bulk copies
//   1 buffer clearer   makes Lamport buffers, which carry results between blocks, usable again
//   1 split combiner   merges the splits of a long context's attention
// Every output row is computed whole, in a fixed order, by the block that drew it, so the same
// input gives the same bits. There is no grid barrier: a block waits for the elements it reads, no
// more.
//
// The stream of a layer
//   parallel residual    QKV, MLP up, attention, MLP down, attention output
//   sequential residual  QKV, attention, attention output, MLP up, MLP down
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "backend/cuda/decode/buffer_clearer.cuh"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/paged_cache.cuh"
#include "backend/cuda/decode/producer.cuh"
#include "backend/cuda/decode/shared.cuh"
#include "backend/cuda/decode/split_combiner.cuh"
#include "backend/cuda/decode/work_scheduler.cuh"
#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/registers.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "sampling/philox.hpp"

namespace clusterfusion::cuda {

inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

// Activations of one matrix as tensor-core fragments: what this lane's slice needs.
template <int kMaxIterations>
struct Fragments {
  uint4 value[kMaxIterations];
};

// `Bias` is the type of the biases' elements.
template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache = PagedCache,
          typename Bias = float>
class DecodeStep {
 public:
  using Frag = Fragments<kMaxIterations>;
  using MmaMapping = plan::MmaMapping;
  static constexpr int kBatch = 5;  // loads under way together
  static_assert(kMaxIterations % kBatch == 0);
  static constexpr bool kPairs = kMaxIterations <= kBatch;  // of units are multiplied side by side
  // Whether this kernel has code for the mappings of plan::with_packed_operands.
  static constexpr bool kPackedOperands =
      kMaxIterations <= kMaxPackedFragments && Cache::kManyLayers;
  // For sm_120, ptxas ignores setmaxnreg: consumers have no more registers than all other threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr bool kFewRegisters = true;
#else
  static constexpr bool kFewRegisters = false;
#endif
  // Wide heads have no registers left for the query.
  static constexpr bool kQueryInRegisters = kMaxHeadSteps <= 8;

  __device__ __forceinline__ DecodeStep(const DecodeParams& params, const Cache& kv_cache,
                                        char* shared)
      : p(params),
        cache(kv_cache),
        control(shared_control(shared)),
        normed(reinterpret_cast<T*>(shared + plan::kControlBytes)),
        sums(shared_sums(params, shared)),
        thread(threadIdx.x),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        q(threadIdx.x % 4),
        ring(&control->ring, params.stages + opaque_zero()) {}

  // All steps of the launch, as a consumer.
  __device__ __forceinline__ void consume() {
    next_id = ring.announcement().id;
    int token = -1;
    for (int step = 0; step < p.steps; ++step) {
      if (step < p.given_count) token = p.given_tokens[step];
      const int position = p.first_position + step;
      const bool scored = step >= p.first_scored_step;
      embed(token);
      mean_before = 0.0f;  // a token's bits must not depend on the one before
      norms_loaded = false;
      best = worst_candidate();
#pragma unroll 1
      for (int index = 0; index < p.num_layers + scored; ++index, ++epoch) {
        run_epoch(index, step, position);
        if (index == p.num_layers) token = choose_token();
      }
      if (!scored) {
        pass_epoch();
        token = -1;
      }
      if (thread == 0 && blockIdx.x == 0) p.chosen[step] = token;
    }
  }

 protected:
  // ---------------------------------------------------------------- consumers

  // Zero, opaque to the compiler: what it is added to stays in a register, where the compiler would
  // load it from constant memory again and again.
  __device__ __forceinline__ int opaque_zero() const {
    return static_cast<int>(block_counter_load(&control->opaque_zero));
  }

  // Keeps the compiler from hoisting the address arithmetic of all phases out of the loop over
  // layers, where it would spill the results.
  __device__ __forceinline__ void make_indices_opaque() {
    asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(g), "+r"(q));
  }

  __device__ __forceinline__ void consumer_barrier() const {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumerThreads) : "memory");
  }

  __device__ __forceinline__ void mark(TimelinePoint point) const {
    if (p.timeline == nullptr || thread != 0) return;
    std::uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    constexpr int kPoints = static_cast<int>(TimelinePoint::count);
    p.timeline[(static_cast<std::int64_t>(blockIdx.x) * p.steps * epochs_per_step(p) + epoch) *
                   kPoints +
               static_cast<int>(point)] = now;
  }

  // A Lamport buffer of this epoch.
  template <typename Element>
  __device__ __forceinline__ Element* lamport(std::int32_t offset) const {
    return reinterpret_cast<Element*>(lamport_set(p, epoch + set_shift) + offset);
  }

  // To be called when this block has read all that it needs of earlier epochs, by all threads, with
  // a barrier before and one behind.
  __device__ __forceinline__ void begin_epoch() {
    if (thread != 0) return;
    if constexpr (Cache::kManyLayers)
      control->ablates_mlp = p.ablated.any && p.ablated.has_mlp(epoch % epochs_per_step(p));
    block_counter_store(&control->begun, epoch + 1);
    block_counter_wait(&control->cleared, epoch);
  }

  // Element offset of this lane's first 8 values in a row segment of its warp.
  __device__ __forceinline__ int lane_column(const StreamedMatrix& matrix) const {
    return (warp & (matrix.segments - 1)) * matrix.segment_columns +
           (g & ((1 << matrix.slices_log2) - 1)) * matrix.slice_columns + q * 8;
  }

  // Slices that lie a multiple of 128 bytes apart would all be read from the same banks of shared
  // memory. Then odd slices take each two iterations in the other order: the even one this many
  // columns later, the odd one as many earlier.
  __device__ __forceinline__ int swap_columns(const StreamedMatrix& matrix) const {
    return matrix.swaps && g % 2 != 0 ? 32 : 0;
  }

  // The same for the activations. With packed operands this lane holds half g % 2 of slice g / 2,
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
    const T* first = lamport<const T>(offset) + activation_column(matrix);
    const int swap = activation_swap(matrix);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      fragments.value[i] = make_uint4(0, 0, 0, 0);
      if (i < (kPackedPairs ? matrix.iterations / 2 : matrix.iterations))
        fragments.value[i] = load_fragment<kPackedPairs>(first, swap, i);
    }
  }
  // ... and repeats those of missing elements until all that this lane needs are there.
  __device__ __forceinline__ void await_activations(const StreamedMatrix& matrix,
                                                    std::int32_t offset, Frag& fragments) {
    const T* first = lamport<const T>(offset) + activation_column(matrix);
    const int swap = activation_swap(matrix);
    bool missing = true;
    while (__any_sync(kAllLanes, missing)) {
      prefetch_chunks();
      missing = false;
#pragma unroll
      for (int i = 0; i < kMaxIterations; ++i) {
        if (!any_half_not_ready(fragments.value[i])) continue;
        missing = true;
        if (kPackedOperands && matrix.mapping == MmaMapping::packed_pairs)
          fragments.value[i] = load_fragment<true>(first, swap, i);
        else
          fragments.value[i] = load_fragment<false>(first, swap, i);
      }
    }
    select_half(matrix, fragments);
  }

  // This thread's pairs of a vector of hidden_size elements: pair j starts at element(j).
  __device__ __forceinline__ int element(int j) const {
    return 2 * (thread + kConsumerThreads * j);
  }
  __device__ __forceinline__ bool holds(int j) const { return element(j) < p.hidden_size; }

  // LayerNorm parameters of this thread's elements, fetched before a barrier, used behind it.
  struct Norm {
    std::uint32_t weight[kMaxIterations] = {}, bias[kMaxIterations] = {};
  };
  // Parameters of a layer's two LayerNorms.
  struct LayerNorms {
    Norm input, post;
  };
  __device__ __forceinline__ void load_norm(const void* weight, const void* bias,
                                            Norm& norm) const {
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      norm.weight[j] = norm.bias[j] = 0;
      if (!holds(j)) continue;
      norm.weight[j] = __ldg(static_cast<const std::uint32_t*>(weight) + element(j) / 2);
      norm.bias[j] = __ldg(static_cast<const std::uint32_t*>(bias) + element(j) / 2);
    }
  }

  // Sums over all elements; `which` of two buffers, so that a second one needs no barrier before.
  __device__ __forceinline__ float2 block_sum(float2 value, int which) {
    value.x = warp_sum(value.x);
    value.y = warp_sum(value.y);
    if (lane == 0) control->reduce[which][warp] = value;
    consumer_barrier();
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < plan::kConsumerWarps; ++w) {
      total.x += control->reduce[which][w].x;
      total.y += control->reduce[which][w].y;
    }
    return total;
  }

  // Sums of x - shift and of its square.
  __device__ __forceinline__ float2 shifted_sums(float shift, int which) {
    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      const float first = holds(j) ? x[j].x - shift : 0.0f;
      const float second = holds(j) ? x[j].y - shift : 0.0f;
      sums.x += first + second;
      sums.y = fmaf(first, first, fmaf(second, second, sums.y));
    }
    return block_sum(sums, which);
  }

  struct Moments {
    float mean, inverse_deviation;
  };
  // Mean and deviation of x. One pass over x - shift, where the shift is the mean of the layer
  // before: exact to rounding as long as the mean has moved by no more than a few deviations.
  // Where it has moved further, a second pass with the mean just found.
  __device__ __forceinline__ Moments moments(bool first_of_epoch) {
    float2 sums = shifted_sums(mean_before, 0);
    if (first_of_epoch) begin_epoch();
    float moved = sums.x * p.inverse_hidden_size;
    float variance = sums.y * p.inverse_hidden_size - moved * moved;
    float mean = mean_before + moved;
    constexpr float kFewDeviations = 16.0f;  // squared: four bits of the variance are lost at most
    if (!(moved * moved <= kFewDeviations * variance)) {
      sums = shifted_sums(mean, 1);
      moved = sums.x * p.inverse_hidden_size;
      variance = sums.y * p.inverse_hidden_size - moved * moved;
      mean += moved;
    }
    mean_before = mean;
    return {mean, rsqrtf(variance + p.layer_norm_eps)};
  }

  // Writes normalised x, rounded, to one of the two inputs in shared memory.
  __device__ __forceinline__ void normalise(const Moments& moments, const Norm& norm, int input) {
    auto* output = reinterpret_cast<std::uint32_t*>(normed + input * p.hidden_size);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      const float2 weight = unpack<T>(norm.weight[j]);
      const float2 bias = unpack<T>(norm.bias[j]);
      const float first = (x[j].x - moments.mean) * moments.inverse_deviation;
      const float second = (x[j].y - moments.mean) * moments.inverse_deviation;
      const std::uint32_t rounded =
          pack<T>(fmaf(first, weight.x, bias.x), fmaf(second, weight.y, bias.y));
      if (holds(j)) output[operand_order(element(j)) / 2] = rounded;
    }
  }

  // One of the normalised inputs as fragments; a barrier lies behind normalise().
  __device__ __forceinline__ void load_normed(const StreamedMatrix& matrix, int input,
                                              Frag& fragments) const {
    const T* first = normed + input * p.hidden_size + activation_column(matrix);
    const int swap = activation_swap(matrix);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      fragments.value[i] = make_uint4(0, 0, 0, 0);
      if (i < matrix.iterations)
        fragments.value[i] =
            *reinterpret_cast<const uint4*>(first + i * 32 + (i % 2 == 0 ? swap : -swap));
    }
    select_half(matrix, fragments);
  }

  // Adds pending residual updates: x += one or two Lamport buffers. All loads of a batch are issued
  // first, and repeated only for missing elements: they share the way from L2 with the weights.
  __device__ __forceinline__ void add_pending_updates(const float* first, const float* second) {
#pragma unroll
    for (int begin = 0; begin < kMaxIterations; begin += kBatch) {
      uint2 delta[kBatch], other[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        delta[i] = other[i] = make_uint2(0, 0);
        if (!holds(begin + i)) continue;
        delta[i] = lamport_load_2(first + element(begin + i));
        if (second != nullptr) other[i] = lamport_load_2(second + element(begin + i));
      }
      bool missing = true;
      while (__any_sync(kAllLanes, missing)) {
        prefetch_chunks();
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (any_not_ready(delta[i])) {
            missing = true;
            delta[i] = lamport_load_2(first + element(begin + i));
          }
          if (any_not_ready(other[i])) {
            missing = true;
            other[i] = lamport_load_2(second + element(begin + i));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        x[begin + i].x += __uint_as_float(delta[i].x) + __uint_as_float(other[i].x);
        x[begin + i].y += __uint_as_float(delta[i].y) + __uint_as_float(other[i].y);
      }
    }
  }

  __device__ __forceinline__ void release_stage() {
    ring.release(lane);
    next_id = ring.announcement().id;
  }
  __device__ __forceinline__ bool is_next(Stream stream) const {
    return next_id == ring_id(epoch, stream);
  }

  // What dot() multiplies, in shared memory.
  struct Unit {
    std::uint32_t values;  // of this lane
    std::uint32_t bias;    // of its row
    int holds_bias;        // whether it is this lane that adds it

    __device__ __forceinline__ float load_bias() const {
      return load_shared_if(bias, holds_bias, Bias{});
    }
  };

  // Prefetch registers: this warp's part of the first chunks that it multiplies next, taken from
  // the ring while it waits for its input. That frees stages, so that memory need not wait as well.
  // Only with packed operands; as many chunks as there are registers for (bfloat16 needs more).
  static constexpr int kMaxPrefetched =
      !kPairs || kFewRegisters || !Cache::kManyLayers || kMaxHeadSteps > 8 ? 0
      : kMaxHeadSteps <= 5 && MmaInput<T>::kIsHalf                         ? 3
                                                                           : 2;
  struct PrefetchRegisters {
    uint4 weight[kPackedOperands ? (kMaxPrefetched > 2 ? kMaxPrefetched : 2) : 1][kBatch] = {};
    float bias[kMaxPrefetched > 0 ? kMaxPrefetched : 1] = {};
    int chunks = 0;
  };

  // Iterates over a warp's units of its segment, chunk after chunk. All state is in registers and
  // advances by increments: between two chunks there is no time to compute addresses.
  struct UnitCursor {
    int unit_index;             // the next unit of this warp in the current chunk
    int offset;                 // in the chunk, of this lane's first values of that unit
    std::uint32_t sum_address;  // where this lane's sum of that unit goes
    int bias_offset;            // in the chunk's biases, of this lane's row of unit 0
    int unit_bias_bytes;
    // From one unit of this warp to the next.
    int unit_step, offset_step, sum_step;
    int chunk_units, chunk_bytes, iterations;
    std::uint32_t swap;
    int holds_sum, holds_bias;  // the lane with the first of a row's sums adds the bias to it
    MmaMapping mapping;

    __device__ __forceinline__ UnitCursor(const DecodeStep& step, const StreamedMatrix& matrix,
                                          bool has_bias) {
      mapping = kPackedOperands ? matrix.mapping : MmaMapping::two_pass;
      const int row_in_unit = step.g >> matrix.slices_log2;
      const int row_in_chunk = mapping == MmaMapping::packed_pairs ? 0 : row_in_unit;
      const int segment = step.warp & (matrix.segments - 1);
      const int slice = step.g & ((1 << matrix.slices_log2) - 1);
      // Each (row, segment, slice) has a sum.
      const int row_sums_log2 = matrix.segments_log2 + matrix.slices_log2;
      const int unit_bytes = matrix.unit_rows * matrix.row_bytes;
      const int unit_sums = matrix.unit_rows << row_sums_log2;
      unit_index = step.warp >> matrix.segments_log2;
      offset =
          unit_index * unit_bytes + row_in_chunk * matrix.row_bytes + step.lane_column(matrix) * 2;
      const int sum = unit_index * unit_sums + (row_in_unit << row_sums_log2) +
                      (segment << matrix.slices_log2) + slice;
      sum_address = shared_address(step.sums + sum);
      const int zero = step.opaque_zero();
      unit_step = (plan::kConsumerWarps >> matrix.segments_log2) + zero;
      offset_step = unit_step * unit_bytes;
      sum_step = unit_step * unit_sums * 4;
      chunk_units = matrix.units_per_chunk + zero;
      chunk_bytes = chunk_units * unit_bytes;
      iterations = matrix.iterations + zero;
      swap = step.swap_columns(matrix) * 2;
      holds_sum = step.q == (mapping == MmaMapping::two_pass ? step.g / 2 : slice);
      holds_bias = holds_sum && has_bias && segment == 0 && slice == 0;
      bias_offset = row_in_chunk * static_cast<int>(sizeof(Bias));
      unit_bias_bytes = matrix.unit_rows * static_cast<int>(sizeof(Bias));
    }

    // A chunk in shared memory.
    struct Chunk {
      std::uint32_t data;
      std::uint32_t biases;
    };
    __device__ __forceinline__ static Chunk chunk(const RingAnnouncement& announcement) {
      return {announcement.data, static_cast<std::uint32_t>(announcement.label.first)};
    }

    // This warp's units of a chunk, two at a time.
    __device__ __forceinline__ void multiply_chunk(Chunk chunk, const Frag& fragments) {
      const std::uint32_t bias = chunk.biases + bias_offset;
      const auto unit_at = [&](int index, int offset) -> Unit {
        return {chunk.data + offset, bias + index * unit_bias_bytes, holds_bias};
      };
      with_iterations(iterations, [&](auto constant) {
        constexpr int kIterations = constant;
        if constexpr (kPairs) {
#pragma unroll 1
          while (unit_index + unit_step < chunk_units) {
            const float2 values = dot_2<kIterations>(
                unit_at(unit_index, offset), unit_at(unit_index + unit_step, offset + offset_step),
                swap, iterations, fragments);
            if (holds_sum != 0) {
              store_shared(sum_address, values.x);
              store_shared(sum_address + sum_step, values.y);
            }
            advance(2);
          }
        }
#pragma unroll 1
        while (unit_index < chunk_units) {
          const float value =
              dot<kIterations>(unit_at(unit_index, offset), swap, iterations, fragments);
          if (holds_sum != 0) store_shared(sum_address, value);
          advance(1);
        }
      });
      unit_index -= chunk_units;
      offset -= chunk_bytes;
    }
    // Loads this warp's only unit of a chunk.
    __device__ __forceinline__ void load(Chunk chunk, uint4 (&weight)[kBatch],
                                         float& of_row) const {
      of_row = load_shared_if(chunk.biases + bias_offset + unit_index * unit_bias_bytes, holds_bias,
                              Bias{});
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        weight[i] = make_uint4(0, 0, 0, 0);
        if (i < iterations) weight[i] = load_iteration(chunk.data + offset, swap, i);
      }
    }
    // The same of this warp's unit of two chunks.
    __device__ __forceinline__ void load_pair(Chunk chunk, PrefetchRegisters& prefetched) const {
      prefetched.bias[0] = load_shared_if(chunk.biases + bias_offset, holds_bias, Bias{});
#pragma unroll
      for (int i = 0; i < 2 * kBatch; ++i) {
        prefetched.weight[i / kBatch][i % kBatch] = make_uint4(0, 0, 0, 0);
        if (i < iterations)
          prefetched.weight[i / kBatch][i % kBatch] = load_iteration(chunk.data + offset, swap, i);
      }
    }
    // Multiplies what load() or load_pair() has loaded.
    __device__ __forceinline__ void multiply(const PrefetchRegisters& prefetched,
                                             const Frag& fragments) {
      if (mapping == MmaMapping::packed_pairs) {
        PackedProducts products;
#pragma unroll
        for (int i = 0; i < 2 * kBatch; ++i)
          products.add_pair(i, prefetched.weight[i / kBatch][i % kBatch], fragments);
        if (holds_sum != 0) store_shared(sum_address, products.diagonal() + prefetched.bias[0]);
      } else {
        PackedProducts products[kMaxPrefetched > 0 ? kMaxPrefetched : 1];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int which = 0; which < kMaxPrefetched; ++which)
            products[which].add(i, prefetched.weight[which][i], fragments.value[i]);
#pragma unroll
        for (int which = 0; which < kMaxPrefetched; ++which)
          if (holds_sum != 0 && which < prefetched.chunks)
            store_shared(sum_address + which * sum_step,
                         products[which].diagonal() + prefetched.bias[which]);
      }
      sum_address += prefetched.chunks * sum_step;
    }

    // Calls `run` with the number of iterations as a constant, where it is one that Pythia's sizes
    // have: loads that need no predicate are issued one behind the other. 0 stands for any other.
    template <typename Run>
    __device__ __forceinline__ static void with_iterations(int iterations, Run&& run) {
      if constexpr (kPairs && !kPackedOperands && !kFewRegisters) {
        if (iterations == 5) return run(std::integral_constant<int, 5>{});
        if (iterations == 4) return run(std::integral_constant<int, 4>{});
      }
      run(std::integral_constant<int, 0>{});
    }
    __device__ __forceinline__ void advance(int units) {
      unit_index += units * unit_step;
      offset += units * offset_step;
      sum_address += units * sum_step;
    }
  };

  // Multiplies the chunks of stage id `id` that come next, until there are `max_slots`, of which
  // `slot` are there; returns how many there are then. With as few instructions as can be, because
  // each takes time. (These three loops have no common frame: where it calls a body, ptxas keeps an
  // announcement on the stack.)
  __device__ __forceinline__ int multiply_chunks(UnitCursor& cursor, int id, int slot,
                                                 int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    do {
      ring.wait_landed();
      cursor.multiply_chunk(cursor.chunk(next), fragments);
      ring.release(lane);
      next = ring.announcement();
      ++slot;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // The same with packed operands, where a warp has one unit of a chunk.
  template <int kIterations>
  __device__ __forceinline__ int multiply_packed(UnitCursor& cursor, int id, int slot,
                                                 int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    const std::uint32_t bias_offset =
        cursor.bias_offset + cursor.unit_index * cursor.unit_bias_bytes;
    do {
      const typename UnitCursor::Chunk chunk = cursor.chunk(next);
      ring.wait_landed();
      uint4 weight[kIterations];
#pragma unroll
      for (int i = 0; i < kIterations; ++i)
        weight[i] = load_iteration(chunk.data + cursor.offset, cursor.swap, i);
      const float bias = load_shared_if(chunk.biases + bias_offset, cursor.holds_bias, Bias{});
      ring.release(lane);
      PackedProducts products;
#pragma unroll
      for (int i = 0; i < kIterations; ++i) products.add(i, weight[i], fragments.value[i]);
      next = ring.announcement();
      const float value = products.diagonal() + bias;
      if (cursor.holds_sum != 0) store_shared(cursor.sum_address, value);
      cursor.sum_address += cursor.sum_step;
      ++slot;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // The same with packed pairs: lanes of g < 4 have the first of two chunks, the others the second.
  // Where there is no second one, the other lanes' sums are not stored.
  template <int kIterations>
  __device__ __forceinline__ int multiply_packed_pairs(UnitCursor& cursor, int id, int slot,
                                                       int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    do {
      const RingAnnouncement behind = ring.next_announcement();
      const bool two = behind.id == id && slot + 1 < max_slots;
      ring.wait_landed();
      if (two) ring.wait_next_landed();
      const typename UnitCursor::Chunk chunk = cursor.chunk(two && g >= 4 ? behind : next);
      uint4 weight[kIterations];
#pragma unroll
      for (int i = 0; i < kIterations; ++i)
        weight[i] = load_iteration(chunk.data + cursor.offset, cursor.swap, i);
      const float bias =
          load_shared_if(chunk.biases + cursor.bias_offset, cursor.holds_bias, Bias{});
      ring.release(lane, two);
      PackedProducts products;
#pragma unroll
      for (int i = 0; i < kIterations; ++i) products.add_pair(i, weight[i], fragments);
      next = ring.announcement();
      const float value = products.diagonal() + bias;
      if (cursor.holds_sum != 0 && (two || g < 4)) store_shared(cursor.sum_address, value);
      cursor.sum_address += cursor.sum_step * (two ? 2 : 1);
      slot += two ? 2 : 1;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // Multiplies all chunks of `stream` that come next, and hands each row's sum, bias included, to
  // `epilogue`. `before_epilogue` is called when the last chunk is multiplied, before rows are
  // reduced: the place to issue loads of what comes next.
  template <typename Epilogue, typename BeforeEpilogue>
  __device__ __forceinline__ void multiply(Stream stream, const StreamedMatrix& matrix,
                                           const Frag& fragments, Epilogue&& epilogue,
                                           BeforeEpilogue&& before_epilogue) {
    make_indices_opaque();
    const int max_slots = matrix.max_slots;
    const int id = ring_id(epoch, stream);
    UnitCursor cursor(*this, matrix, control->has_bias[static_cast<int>(stream)]);
    int slot = 0;
    if (kMaxPrefetched > 0 && prefetched.chunks > 0) {
      cursor.multiply(prefetched, fragments);
      slot = prefetched.chunks;
      next_id = ring.announcement().id;
    }
    discard_prefetched();
#pragma unroll 1
    while (true) {
      if (kPackedOperands && cursor.mapping == MmaMapping::packed && cursor.iterations == 5)
        slot = multiply_packed<5>(cursor, id, slot, max_slots, fragments);
      else if (kPackedOperands && cursor.mapping == MmaMapping::packed)
        slot = multiply_packed<4>(cursor, id, slot, max_slots, fragments);
      else if (kPackedOperands && cursor.mapping == MmaMapping::packed_pairs &&
               cursor.iterations == 10)
        slot = multiply_packed_pairs<10>(cursor, id, slot, max_slots, fragments);
      else if (kPackedOperands && cursor.mapping == MmaMapping::packed_pairs)
        slot = multiply_packed_pairs<8>(cursor, id, slot, max_slots, fragments);
      else
        slot = multiply_chunks(cursor, id, slot, max_slots, fragments);
      const bool over = next_id != id;
      if (over) break;
      reduce_rows(matrix, slot, epilogue);
      cursor.sum_address -= slot * matrix.sums_per_chunk * 4;
      slot = 0;
    }
    before_epilogue();
    if (slot > 0) reduce_rows(matrix, slot, epilogue);
  }
  template <typename Epilogue>
  __device__ __forceinline__ void multiply(Stream stream, const StreamedMatrix& matrix,
                                           const Frag& fragments, Epilogue&& epilogue) {
    multiply(stream, matrix, fragments, epilogue, [] {});
  }

  // Nothing is prefetched from here on: tells the compiler, which would keep the registers alive.
  __device__ __forceinline__ void discard_prefetched() {
    prefetched = PrefetchRegisters{};
    norms = LayerNorms{};
    norms_loaded = false;
  }

  // Moves the next chunks from the ring to prefetch registers, if they have landed and are not
  // attention's; `next_id` stays theirs. For whole warps.
  __device__ __forceinline__ void prefetch_chunks() {
    if constexpr (kMaxPrefetched > 0) {
      if (prefetched.chunks == kMaxPrefetched || next_id == kRingEnd) return;
      const int stream = stream_of(next_id);
      if (stream == static_cast<int>(Stream::attention)) return;
      if (!ring.peek().holds(next_id)) return;
      make_indices_opaque();
      const StreamedMatrix& matrix = control->matrices[stream];
      if (matrix.mapping == MmaMapping::two_pass) return;
      const UnitCursor cursor(*this, matrix, control->has_bias[stream]);
      if (cursor.mapping == MmaMapping::packed_pairs) {
        const RingPeek first = ring.peek(), second = ring.peek_next();
        if (prefetched.chunks > 0 || matrix.max_slots < 3 || !second.holds(next_id)) return;
        cursor.load_pair(cursor.chunk(g < 4 ? first.what : second.what), prefetched);
        ring.release(lane, true);
        prefetched.chunks = 2;
        return;
      }
#pragma unroll
      for (int i = 0; i < kMaxPrefetched; ++i) {
        if (i != prefetched.chunks || i + 1 >= matrix.max_slots) continue;
        const RingPeek chunk = ring.peek();
        if (!chunk.holds(next_id)) return;
        cursor.load(cursor.chunk(chunk.what), prefetched.weight[i], prefetched.bias[i]);
        ring.release(lane);
        ++prefetched.chunks;
      }
    }
  }

  // This lane's share of a unit; lanes q = g / 2 get slice g % slices of row g / slices. The four
  // words of a lane's 16 bytes of weights are operand A as they stand: words 0 and 2 in row g,
  // words 1 and 3 in row g + 8. So the activations, operand B, are words 0 and 2 for a first
  // product, of which rows 0 to 7 count, and words 1 and 3 for a second, of which rows 8 to 15 do;
  // they lie in this order in memory (operand_order). In both the diagonal counts: row g (+ 8),
  // column g.
  template <int kIterations>
  __device__ __forceinline__ static float dot(const Unit& unit, std::uint32_t swap, int iterations,
                                              const Frag& fragments) {
    Products products;
    const float bias = unit.load_bias();
#pragma unroll
    for (int first = 0; first < (kIterations > 0 ? kIterations : kMaxIterations); first += kBatch) {
      if (kIterations == 0 && first > 0 && first >= iterations) break;
      uint4 weight[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        weight[i] = make_uint4(0, 0, 0, 0);
        if (first + i < (kIterations > 0 ? kIterations : iterations))
          weight[i] = load_iteration(unit.values, swap, first + i);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (kIterations == 0 || first + i < kIterations)
          products.add(i, weight[i], fragments.value[first + i]);
    }
    return products.diagonal() + bias;
  }

  // Iteration i of a unit whose values begin at `address`.
  __device__ __forceinline__ static uint4 load_iteration(std::uint32_t address, std::uint32_t swap,
                                                         int i) {
    return load_shared_4((i % 2 == 0 ? address + swap : address - swap) + i * 64);
  }

  // In independent chains, to hide the latency of a product.
  struct Products {
    float even[2][4] = {}, odd[2][4] = {};
    __device__ __forceinline__ void add(int i, const uint4& weight, const uint4& activation) {
      mma_16x8x16<T>(even[i % 2], weight, activation.x, activation.y);
      mma_16x8x16<T>(odd[i % 2], weight, activation.z, activation.w);
    }
    __device__ __forceinline__ float diagonal() const {
      const bool odd_column = threadIdx.x & 4;  // g is odd
      return odd_column ? (even[0][1] + even[1][1]) + (odd[0][3] + odd[1][3])
                        : (even[0][0] + even[1][0]) + (odd[0][2] + odd[1][2]);
    }
  };

  // With packed operands: the first half of slice s in column 2 s of operand B, the second in
  // column 2 s + 1. Rows 0 to 7 have the first half of a slice's weights, rows 8
  // to 15 the second, so one product is all it takes; lanes q get slice q = g % slices of row g /
  // slices.
  struct PackedProducts {
    float result[2][4] = {};
    __device__ __forceinline__ void add(int i, const uint4& weight, const uint4& activation) {
      mma_16x8x16<T>(result[i % 2], weight, activation.x, activation.y);
    }
    // Iteration i, where a fragment has two.
    __device__ __forceinline__ void add_pair(int i, const uint4& weight, const Frag& fragments) {
      const uint4& activation = fragments.value[i / 2];
      if (i % 2 == 0)
        mma_16x8x16<T>(result[0], weight, activation.x, activation.y);
      else
        mma_16x8x16<T>(result[1], weight, activation.z, activation.w);
    }
    __device__ __forceinline__ float diagonal() const {
      return (result[0][0] + result[1][0]) + (result[0][3] + result[1][3]);
    }
  };

  // The same for two units at once, with the same sums in the same order.
  template <int kIterations>
  __device__ __forceinline__ static float2 dot_2(const Unit& first, const Unit& second,
                                                 std::uint32_t swap, int iterations,
                                                 const Frag& fragments) {
    constexpr int kLoads = kIterations > 0 ? kIterations : kBatch;
    uint4 weight[2][kLoads];
    const float2 bias = make_float2(first.load_bias(), second.load_bias());
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        weight[unit][i] = make_uint4(0, 0, 0, 0);
        if (kIterations > 0 || i < iterations)
          weight[unit][i] = load_iteration(unit == 0 ? first.values : second.values, swap, i);
      }
    Products products[2];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int unit = 0; unit < 2; ++unit)
        products[unit].add(i, weight[unit][i], fragments.value[i]);
    return make_float2(products[0].diagonal() + bias.x, products[1].diagonal() + bias.y);
  }

  // Adds up the sums of each row, by some lanes each.
  template <typename Epilogue>
  __device__ __forceinline__ void reduce_rows(const StreamedMatrix& matrix, int slots,
                                              Epilogue&& epilogue) {
    consumer_barrier();
    const unsigned before = control->finished_chunks;
    const int count = slots * matrix.rows_per_chunk;
    const int rows_at_once = kConsumerThreads >> matrix.row_lanes_log2;
    for (int first = 0; first < count; first += rows_at_once) {
      const int i = first + (thread >> matrix.row_lanes_log2);
      const float* own =
          sums + (((first << matrix.row_lanes_log2) + thread) << matrix.lane_sums_log2);
      float value = 0.0f;
      if (i < count) {
        if (matrix.lane_sums_log2 >= 2) {
          const float4 low = *reinterpret_cast<const float4*>(own);
          value = (low.x + low.y) + (low.z + low.w);
          if (matrix.lane_sums_log2 == 3) {
            const float4 high = *reinterpret_cast<const float4*>(own + 4);
            value += (high.x + high.y) + (high.z + high.w);
          }
        } else {
          for (int sum = 0; sum < 1 << matrix.lane_sums_log2; ++sum) value += own[sum];
        }
      }
      for (int distance = 1; distance < 1 << matrix.row_lanes_log2; distance *= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
      if (i >= count || (thread & ((1 << matrix.row_lanes_log2) - 1)) != 0) continue;
      const int slot = matrix.slot_of(i);
      const int chunk = control->chunks[(before + slot) % kKnownChunks];
      const int row = (chunk - slot) * matrix.rows_per_chunk + i;
      if (row < matrix.rows) epilogue(row, value);
    }
    consumer_barrier();
    if (thread == 0) control->finished_chunks = before + slots;
  }

  // ---------------------------------------------------------------- attention

  // Query, key and value of the current position for one head, in shared memory: first as they come
  // from the QKV matrix, then the query rotated and scaled, the key rotated, all rounded.
  struct HeadInputs {
    float* raw;  // [3, head_dim]
    T* ready;    // [4, head_dim]: query, key, value, and what rounding took from the query
  };
  __device__ __forceinline__ HeadInputs head_inputs() const {
    float* raw = sums + plan::kConsumerWarps * (p.head_dim + 2);  // behind the warps' states
    return {raw, reinterpret_cast<T*>(raw + 3 * p.head_dim)};
  }

  // All threads: one trip to global memory, two barriers.
  __device__ __forceinline__ void prepare_head(int head, int position) {
    const HeadInputs inputs = head_inputs();
    const float* qkv = lamport<const float>(p.layout.qkv) + head * 3 * p.head_dim;
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
    consumer_barrier();
  }

  // State of one warp's online softmax over its positions of one head; base-2 logarithms.
  struct Softmax {
    float maximum;  // the same in all lanes
    float sum;      // lanes 0 to 3: each its own columns
    // Lanes q = 0: [0] + [1] is dimension 16 t + g, [2] + [3] 16 t + g + 8.
    float output[kMaxHeadSteps][4];
  };

  __device__ __forceinline__ void attend(int layer, int position) {
    make_indices_opaque();
    const plan::AttentionSplits splits = splits_at(p, position);
    Query query;
    Softmax state;
    int task = -1, head = 0, last_block = 0;
    while (is_next(Stream::attention)) {
      const RingAnnouncement what = ring.wait();
      if (what.label.first != task) {
        task = what.label.first;
        head = task / splits.splits;
        const int split = task % splits.splits;
        last_block = min((split + 1) * splits.blocks_per_split, splits.blocks) - 1;
        prepare_head(head, position);
        load_query(query);
        state.maximum = -INFINITY;
        state.sum = 0.0f;
#pragma unroll
        for (int t = 0; t < kMaxHeadSteps; ++t)
          state.output[t][0] = state.output[t][1] = state.output[t][2] = state.output[t][3] = 0.0f;
      }
      const int block = what.label.second;
      attend_block(layer, head, block, position, what.data, query, state);
      release_stage();
      if (block == last_block) combine_warps(layer, head, task, splits.splits, state);
    }
  }

  // Step t of the query as operand A: rounded in row 0, what rounding took from it in row 1, so
  // that its precision is that of twice as many bits; the other rows are zero.
  __device__ __forceinline__ uint2 query_step(int t) const {
    if (g > 1 || 16 * t >= p.head_dim) return make_uint2(0, 0);
    const T* query = head_inputs().ready + (g == 0 ? 0 : 3 * p.head_dim);
    return *reinterpret_cast<const uint2*>(query + 16 * t + 4 * q);
  }
  struct Query {
    uint2 step[kQueryInRegisters ? kMaxHeadSteps : 1];
  };
  __device__ __forceinline__ void load_query(Query& query) const {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int t = 0; t < kMaxHeadSteps; ++t) query.step[t] = query_step(t);
    }
  }

  // Positions that a warp takes at once, in two halves of 8.
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static_assert(kGroup == 16);
  // Steps of a head whose keys, or values, are under way together. What is behind the head's end is
  // zero: no branch keeps loads and products apart.
  static constexpr int kStepsAtOnce = kMaxHeadSteps <= 5 ? kMaxHeadSteps : 4;
  static_assert(kMaxHeadSteps % kStepsAtOnce == 0);

  // This warp's group of positions of one block, which lies at `data` in shared memory. The warps
  // take the groups of one block after the other round-robin.
  __device__ __forceinline__ void attend_block(int layer, int head, int block, int position,
                                               std::uint32_t data, const Query& query,
                                               Softmax& state) {
    const int groups = p.kv_block_positions / kGroup;
    const int group = (warp - block * groups) & (plan::kConsumerWarps - 1);
    if (group >= groups) return;
    const int first = block * p.kv_block_positions + group * kGroup;
    if (first > position) return;
    const int row_bytes = p.head_dim * 2;
    char* keys = static_cast<char*>(__cvta_shared_to_generic(data)) + group * kGroup * row_bytes;
    char* values = keys + p.kv_block_positions * row_bytes;
    if (position < first + kGroup) insert_current(layer, head, position, keys, values);

    float score[2][4] = {};  // of the group's halves
    multiply_keys(query, shared_address(keys + g * row_bytes) + q * 8, score);
    // Lanes point at the halves' rows, at the first and the second 8 dimensions of a step.
    const std::uint32_t rows =
        shared_address(values + (lane / 16 * 8 + lane % 8) * row_bytes) + lane / 8 % 2 * 16;
    uint4 value[kStepsAtOnce];
    load_values(rows, 0, value);
    std::uint32_t weights[2];
    const float correction = weigh(first, position, score, state, weights);
#pragma unroll
    for (int begin = 0; begin < kMaxHeadSteps; begin += kStepsAtOnce) {
      if (begin > 0) load_values(rows, begin, value);
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        float(&output)[4] = state.output[begin + i];
        for (float& element : output) element *= correction;
        mma_16x8x16<T>(output, value[i], weights[0], weights[1]);
      }
    }
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

  // score += query keys, for the two halves of a group; `keys` is where this lane's part of the
  // first half lies in shared memory.
  __device__ __forceinline__ void multiply_keys(const Query& query, std::uint32_t keys,
                                                float (&score)[2][4]) const {
    const int half_bytes = 8 * p.head_dim * 2;
#pragma unroll
    for (int begin = 0; begin < kMaxHeadSteps; begin += kStepsAtOnce) {
      uint2 part[kStepsAtOnce], key[kStepsAtOnce][2];
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const int t = begin + i;
        if constexpr (kQueryInRegisters)
          part[i] = query.step[t];
        else
          part[i] = query_step(t);
        const bool is_there = 16 * t < p.head_dim;
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

  // Steps of a group's values from step `begin` on, as operands A.
  __device__ __forceinline__ void load_values(std::uint32_t rows, int begin,
                                              uint4 (&value)[kStepsAtOnce]) const {
#pragma unroll
    for (int i = 0; i < kStepsAtOnce; ++i) {
      value[i] = make_uint4(0, 0, 0, 0);
      if (16 * (begin + i) < p.head_dim)
        value[i] = load_matrix_4_transposed(rows + (begin + i) * 32);
    }
  }

  // Puts the current position's key and value into the landed block and into the cache, and clears
  // the values behind it in this group: whatever lies there must not reach a product.
  __device__ __forceinline__ void insert_current(int layer, int head, int position, char* keys,
                                                 char* values) {
    const int row = position % kGroup;
    const T* ready = head_inputs().ready;
    for (int dim = lane; dim < p.head_dim; dim += 32) {
      const T key = ready[p.head_dim + dim];
      const T value = ready[2 * p.head_dim + dim];
      reinterpret_cast<T*>(keys)[row * p.head_dim + dim] = key;
      reinterpret_cast<T*>(values)[row * p.head_dim + dim] = value;
      cache.store(layer, head, position, dim, key, value);
      for (int later = row + 1; later < kGroup; ++later)
        reinterpret_cast<T*>(values)[later * p.head_dim + dim] = static_cast<T>(0.0f);
    }
    fence_before_bulk_copy();
    __syncwarp();
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
    float* partial = lamport<float>(p.layout.partials) + task * stride;
    for (int dim = thread; dim < p.head_dim; dim += kConsumerThreads) {
      float value = 0.0f;
      for (int w = 0; w < plan::kConsumerWarps; ++w)
        value += sums[w * stride + 2 + dim] * exp2f(sums[w * stride] - maximum);
      if (num_splits == 1)
        lamport_store(lamport<T>(p.layout.attention) + operand_order(head * p.head_dim + dim),
                      static_cast<T>(value / total));
      else
        lamport_store(partial + 2 + dim, value);
    }
    if (num_splits > 1 && thread < 2)
      lamport_store(partial + thread, thread == 0 ? maximum : total);
    consumer_barrier();
  }

  // Interventions are the engine's alone.
  __device__ __forceinline__ bool is_ablated(int layer, int head) const {
    if constexpr (Cache::kManyLayers) return p.ablated.has_head(layer * p.num_heads + head);
    return false;
  }

  // ---------------------------------------------------------------- the step

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

  // Those of layer `index`, or the final one's behind the last layer.
  __device__ __forceinline__ void load_norms(int index) {
    const StreamedLayer layer = layer_at(p, index);
    const bool is_final = index == p.num_layers;
    load_norm(is_final ? p.final_norm_weight : layer.input_norm_weight,
              is_final ? p.final_norm_bias : layer.input_norm_bias, norms.input);
    if (!is_final) load_norm(layer.post_norm_weight, layer.post_norm_bias, norms.post);
  }

  // One epoch: a layer, or the LM head behind the last one.
  //
  // There is one copy of the code for all matrices. The whole of it runs once a layer, so it has to
  // fit into the instruction cache: what does not comes from L2, behind the weights.
  __device__ __forceinline__ void run_epoch(int index, int step, int position) {
    mark(TimelinePoint::begin);
    const bool is_lm_head = index == p.num_layers;
    const int parts = is_lm_head || p.parallel_residual ? 1 : 2;
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      prepare_input(index, part);
      Frag fragments;
      bool requested = false;  // the loads of `fragments` have been issued
      const int streams = is_lm_head ? 1 : p.parallel_residual ? 4 : 2;
#pragma unroll 1
      for (int i = 0; i < streams; ++i) {
        const Stream stream = stream_at(is_lm_head, part, i);
        if (stream == (p.parallel_residual ? Stream::mlp_down : Stream::attention_out)) {
          if (is_next(Stream::attention)) {
            attend(index, position);
            discard_prefetched();
          }
          mark(TimelinePoint::attention);
        }
        if (is_next(stream)) multiply_stream(stream, index, step, position, fragments, requested);
      }
    }
  }

  // The streams of an epoch's part, in order.
  __device__ __forceinline__ Stream stream_at(bool is_lm_head, int part, int i) const {
    if (is_lm_head) return Stream::lm_head;
    if (p.parallel_residual) {
      if (i < 2) return i == 0 ? Stream::qkv : Stream::mlp_up;
      return i == 2 ? Stream::mlp_down : Stream::attention_out;
    }
    if (part == 0) return i == 0 ? Stream::qkv : Stream::attention_out;
    return i == 0 ? Stream::mlp_up : Stream::mlp_down;
  }

  // Adds pending residual updates to x, then normalises it. Pending are the products of the epoch
  // before in the first part, attention's in the second part of a layer with sequential residual,
  // and before the first layer a steering vector.
  __device__ __forceinline__ void prepare_input(int index, int part) {
    make_indices_opaque();
    if (!norms_loaded) load_norms(index);
    const bool is_first = index == 0 && part == 0;
    if (!is_first || p.first_steering != nullptr) {
      char* set = lamport_set(p, part == 0 ? epoch - 1 : epoch);
      const auto* attention = reinterpret_cast<const float*>(set + p.layout.delta_attention);
      const auto* mlp = reinterpret_cast<const float*>(set + p.layout.delta_mlp);
      add_pending_updates(is_first    ? p.first_steering
                          : part == 0 ? mlp
                                      : attention,
                          part == 0 && !is_first && p.parallel_residual ? attention : nullptr);
    }
    mark(TimelinePoint::input);
    const Moments m = moments(part == 0);
    if (part == 0) normalise(m, norms.input, 0);
    if (part == 1 || (p.parallel_residual && index < p.num_layers)) normalise(m, norms.post, 1);
    norms = LayerNorms{};
    norms_loaded = false;
    consumer_barrier();
    mark(TimelinePoint::normalised);
  }

  __device__ __forceinline__ void multiply_stream(Stream stream, int index, int step, int position,
                                                  Frag& fragments, bool& requested) {
    make_indices_opaque();
    const StreamedMatrix& matrix = control->matrices[static_cast<int>(stream)];
    const bool from_buffer = stream == Stream::mlp_down || stream == Stream::attention_out;
    if (from_buffer) {
      const std::int32_t source = stream == Stream::mlp_down ? p.layout.mlp : p.layout.attention;
      if (!requested) request_activations(matrix, source, fragments);
      await_activations(matrix, source, fragments);
      mark(stream == Stream::mlp_down ? TimelinePoint::mlp : TimelinePoint::attention_in);
    } else {
      load_normed(matrix, stream == Stream::mlp_up ? 1 : 0, fragments);
    }
    requested = false;
    float* result = nullptr;
    TimelinePoint done = TimelinePoint::qkv;
    switch (stream) {
      case Stream::qkv: result = lamport<float>(p.layout.qkv); break;
      case Stream::mlp_up: done = TimelinePoint::mlp_up; break;
      case Stream::mlp_down:
        result = lamport<float>(p.layout.delta_mlp);
        done = TimelinePoint::mlp_down;
        break;
      case Stream::attention_out:
        result = lamport<float>(p.layout.delta_attention);
        done = TimelinePoint::attention_out;
        break;
      default:
        if (p.logits != nullptr)
          result = p.logits + static_cast<std::int64_t>(step - p.first_scored_step) * p.vocab_size;
    }
    multiply(
        stream, matrix, fragments,
        [&](int row, float value) {
          if (stream == Stream::mlp_up) {
            const float activated = control->ablates_mlp ? 0.0f : activate(p.activation, value);
            lamport_store(lamport<T>(p.layout.mlp) + operand_order(row), static_cast<T>(activated));
            return;
          }
          if (result != nullptr) lamport_store(result + row, value);
          if (stream != Stream::lm_head) return;
          const Candidate here = candidate(row, value, position);
          if (better(here, best)) best = here;
        },
        [&] {
          // Attention comes between a layer's other streams and what needs it, or has been before.
          const Stream next = p.parallel_residual ? Stream::attention_out : Stream::mlp_down;
          const Stream before = p.parallel_residual ? Stream::mlp_down : Stream::mlp_up;
          requested = stream == before && is_next(next);
          if (requested)
            request_activations(control->matrices[static_cast<int>(next)],
                                p.parallel_residual ? p.layout.attention : p.layout.mlp, fragments);
          if (kPairs &&
              stream == (p.parallel_residual ? Stream::attention_out : Stream::mlp_down)) {
            load_norms(index + 1);
            norms_loaded = true;
          }
        });
    mark(done);
  }

  // ---------------------------------------------------------------- choosing the token

  __device__ __forceinline__ static bool better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
  }

  // A logit that is not finite beats everything, as kNoToken.
  static constexpr std::int64_t kNoToken = 0xffffffff;
  __device__ __forceinline__ Candidate candidate(int token, float logit, int position) const {
    if (!isfinite(logit)) return {INFINITY, kNoToken};
    if (token >= p.drawable_vocab_size) return worst_candidate();
    if (p.temperature == 0.0f) return {logit, token};
    const PhiloxCounter words = noise_words(p.seed, position + 1, token / 4);
    const std::uint32_t low = token % 2 == 0 ? words[0] : words[1];
    const std::uint32_t high = token % 2 == 0 ? words[2] : words[3];
    return {noisy_score(logit, p.temperature, token % 4 < 2 ? low : high), token};
  }
  __device__ __forceinline__ static Candidate worst_candidate() { return {-INFINITY, 0x7fffffff}; }

  __device__ __forceinline__ Candidate best_of_warp(Candidate best) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Candidate other{__shfl_xor_sync(kAllLanes, best.score, offset),
                            __shfl_xor_sync(kAllLanes, best.token, offset)};
      if (better(other, best)) best = other;
    }
    return best;
  }

  // All blocks' best candidates, as they come; for one warp.
  __device__ __forceinline__ Candidate best_of_blocks(const std::uint64_t* candidates) const {
    Candidate best = worst_candidate();
    for (int i = lane; i < static_cast<int>(gridDim.x); i += 32) {
      const auto score = static_cast<long long>(lamport_wait(candidates + 2 * i));
      const Candidate other{__longlong_as_double(score),
                            static_cast<std::int64_t>(lamport_wait(candidates + 2 * i + 1))};
      if (better(other, best)) best = other;
    }
    return best_of_warp(best);
  }

  // The LM head's epoch where no logits are wanted.
  __device__ __forceinline__ void pass_epoch() {
    consumer_barrier();
    begin_epoch();
    consumer_barrier();
    ++epoch;
  }

  // The best of all blocks' candidates; every block finds it for itself.
  __device__ __forceinline__ int choose_token() {
    best = best_of_warp(best);
    if (lane == 0) control->candidate[warp] = best;
    consumer_barrier();
    auto* candidates = lamport<std::uint64_t>(p.layout.candidates);
    if (warp == 0) {
      if (lane == 0) {
        for (int w = 1; w < plan::kConsumerWarps; ++w)
          if (better(control->candidate[w], best)) best = control->candidate[w];
        auto* own = candidates + 2 * blockIdx.x;
        lamport_store(own, static_cast<std::uint64_t>(__double_as_longlong(best.score)));
        lamport_store(own + 1, static_cast<std::uint64_t>(best.token));
      }
      best = best_of_blocks(candidates);
      if (lane == 0) control->token = static_cast<int>(best.token);  // kNoToken: -1
    }
    consumer_barrier();
    return control->token;
  }

  const DecodeParams& p;
  const Cache& cache;
  SharedControl* control;
  T* normed;    // [2, hidden]: the two normalised inputs of a layer
  float* sums;  // [sum_slots]: partial sums of rows; states of attention
  int thread, warp, lane, g, q;
  RingConsumer ring;
  int next_id = kRingEnd;  // of the next stage, or of what lies in prefetch registers
  PrefetchRegisters prefetched;
  LayerNorms norms;  // of the next LayerNorm
  bool norms_loaded = false;
  int epoch = 0;
  int set_shift = 0;  // Lamport sets begin with this one
  // The residual stream, the same in every block: this thread's pairs of elements.
  float2 x[kMaxIterations];
  float mean_before = 0.0f;  // of x, at the last LayerNorm
  Candidate best;            // among the logits that this thread has finished
};

template <typename T, int kMaxIterations, int kMaxHeadSteps>
__global__ void __launch_bounds__(kDecodeBlockThreads, 1)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(128) char shared[];
  SharedControl* control = shared_control(shared);
  if (threadIdx.x == 0) init_shared(params, shared);
  if (threadIdx.x == 32) init_sources(params, control);
  __syncthreads();
  const PagedCache cache{params};
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < plan::kConsumerWarps) {
    take_registers<kConsumerRegisters>();
    DecodeStep<T, kMaxIterations, kMaxHeadSteps>(params, cache, shared).consume();
    return;
  }
  give_up_registers<kProducerRegisters>();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  switch (warp - plan::kConsumerWarps) {
    case 0:
      if (elect_one()) produce(params, cache, control);
      break;
    case 1: clear_buffers(params, control, lane); break;
    case 2: SplitCombiner<T>(params, control).run(); break;
    default:
      if (elect_one()) WorkScheduler(params, cache, control).run();
  }
}

}  // namespace clusterfusion::cuda
