// What all parts of a consumer thread's work share: who it is, what comes next in the ring, and its
// state. The parts (units, matrix product, activations, residual, attention, choice of a token, the
// step) are one class, each part derived from the one before: so all of the state is one object,
// which stays in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/shared.cuh"
#include "backend/cuda/numeric/pack.cuh"

namespace clusterfusion::cuda {

// Activations of one matrix as tensor-core fragments: what this lane's slice needs.
template <int kMaxIterations>
struct Fragments {
  uint4 value[kMaxIterations];
};

// `Cache`: where keys and values lie, PagedCache or RowCache. `Bias`: the type of the biases'
// elements.
template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeConsumer {
 public:
  using Frag = Fragments<kMaxIterations>;
  using MmaMapping = plan::MmaMapping;
  static constexpr int kBatch = kMaxIterations % 5 == 0 ? 5 : 4;  // loads under way together
  static constexpr bool kPairs = kMaxIterations <= kBatch;  // of units are multiplied side by side
  // Whether this kernel has code for the mappings of plan::with_packed_operands.
  static constexpr bool kPackedOperands =
      has_packed_operands(kKind, kMaxIterations) && Cache::kManyLayers;
  // Without setmaxnreg consumers have no more registers than all other threads.
  static constexpr bool kFewRegisters = !kWarpgroups;
  // Wide heads have no registers left for the query.
  static constexpr bool kQueryInRegisters = kMaxHeadSteps <= 8;

  __device__ __forceinline__ DecodeConsumer(const DecodeParams& params, const Cache& kv_cache,
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

 protected:
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

  // Interventions are the engine's alone.
  __device__ __forceinline__ bool is_ablated(int layer, int head) const {
    if constexpr (Cache::kManyLayers) return p.ablated.has_head(layer * p.num_heads + head);
    return false;
  }

  __device__ __forceinline__ bool is_next(Stream stream) const {
    return next_id == ring_id(epoch, stream);
  }

  // Element offset of this lane's first 8 values in a row segment of its warp.
  __device__ __forceinline__ int lane_column(const StreamedMatrix& matrix) const {
    const int column = (warp & (matrix.segments - 1)) * matrix.segment_columns +
                       (g & ((1 << matrix.slices_log2) - 1)) * matrix.slice_columns + q * 8;
    if constexpr (kKind == plan::LayerKind::plain) return column;
    if (g < 4 || matrix.first_stage_bytes == 0) return column;
    return column - matrix.segment_columns + matrix.first_stage_bytes / 2;
  }

  // How many of a lane's iterations the matrix has columns for, where the first begins at column
  // `first`: the last slices of a ragged one are shorter.
  __device__ __forceinline__ int lane_iterations(const StreamedMatrix& matrix, int first) const {
    if constexpr (kKind == plan::LayerKind::plain) return matrix.iterations;
    return min(matrix.iterations, max(matrix.row_bytes / 2 - first + 31, 0) / 32);
  }

  // Slices that lie a multiple of 128 bytes apart would all be read from the same banks of shared
  // memory. Then odd slices take each two iterations in the other order: the even one this many
  // columns later, the odd one as many earlier.
  __device__ __forceinline__ int swap_columns(const StreamedMatrix& matrix) const {
    return matrix.swaps && g % 2 != 0 ? 32 : 0;
  }

  // LayerNorm parameters of this thread's elements, fetched before a barrier, used behind it.
  struct Norm {
    std::uint32_t weight[kMaxIterations] = {}, bias[kMaxIterations] = {};
  };
  // Parameters of a layer's two LayerNorms.
  struct LayerNorms {
    Norm input, post;
  };

  // Prefetch registers: this warp's part of the first chunks that it multiplies next, taken from
  // the ring while it waits for its input. That frees stages, so that memory need not wait as well.
  // Only with packed operands, or of rows in two stages; as many chunks as there are registers for
  // (bfloat16 needs more).
  static constexpr int kMaxPrefetched = !kPackedOperands || kFewRegisters || kMaxHeadSteps > 8 ? 0
                                        : !kPairs ? (kMaxIterations <= 8 ? 2 : 0)
                                        : kMaxHeadSteps <= 5 && MmaInput<T>::kIsHalf ? 3
                                                                                     : 2;
  static constexpr int kPrefetchLoads = kPairs ? kBatch : 4;  // of a unit
  struct PrefetchRegisters {
    uint4 weight[kPackedOperands ? (kMaxPrefetched > 2 ? kMaxPrefetched : 2) : 1][kPrefetchLoads] =
        {};
    float bias[kMaxPrefetched > 0 ? kMaxPrefetched : 1] = {};
    int chunks = 0;
  };

  // Nothing is prefetched from here on: tells the compiler, which would keep the registers alive.
  __device__ __forceinline__ void discard_prefetched() {
    prefetched = PrefetchRegisters{};
    norms = LayerNorms{};
    norms_loaded = false;
  }

  const DecodeParams& p;
  const Cache& cache;
  SharedControl* control;
  T* normed;    // [1 or 2, hidden]: normalised inputs of a layer (plan::normed_inputs)
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

}  // namespace clusterfusion::cuda
