// One decoder layer with parallel residual, or a half of it, on the caller's own tensors: the
// machine of the streaming decode kernel (decode/decode_kernel.cuh) with other caches and other
// ends.
#pragma once

#include "backend/cuda/decode/decode_kernel.cuh"
#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/ops/layer_caches.cuh"
#include "backend/cuda/ops/layer_params.hpp"
#include "backend/cuda/ptx/grid_dependency.cuh"

namespace clusterfusion::cuda {

// Nobody promises that all blocks of a launch are resident together: kernels of other streams may
// hold SMs, and a launch that makes sure of it costs the calling thread 1 us more. So blocks are
// numbered in the order in which they start, and what is shared out by number to blocks that have
// not started, those that have do as well. A block that starts later does it again: the same bits
// in the same places. So none waits for anything but what blocks do that have started.

// Counts this block's start, by one thread, before a block barrier. All blocks of a launch start
// before any of the next one does: that may be made resident only from here on, and waits there for
// the end of this one.
template <bool kInPages>
__device__ __forceinline__ void start_block(const LayerParams& layer, SharedControl* control) {
  const std::uint32_t blocks = gridDim.x;
  const std::uint32_t before = atomicInc(layer.started, 2 * blocks - 1);
  const std::uint32_t half = before < blocks ? 0 : 1;
  control->scratch_half = static_cast<int>(half);
  control->block_number = static_cast<int>(before - half * blocks);
  control->all_started = control->attended = 0;
  if constexpr (kInPages) control->row_found = 0;
  if (before < 2 * blocks) start_dependents();  // always, but not before the count is known
}

// How many blocks of this launch have started.
__device__ __forceinline__ int blocks_started(const LayerParams& layer, int half) {
  const auto blocks = static_cast<int>(gridDim.x);
  const auto count = static_cast<int>(*static_cast<volatile const std::uint32_t*>(layer.started));
  const int started = count - half * blocks;
  return started > 0 && started < blocks ? started : blocks;  // else the next launch is counted
}

// By one thread of each block: tells the others when all blocks have started, which the last ones
// mostly do a few microseconds after the first. Does not look for ever, because this block has to
// end where others wait for its SM.
__device__ __forceinline__ void watch_starts(const LayerParams& layer, SharedControl* control) {
  constexpr int kLooks = 40;
  constexpr unsigned kNanoseconds = 250;  // between two of them
  for (int look = 0; look < kLooks; ++look) {
    if (blocks_started(layer, control->scratch_half) == static_cast<int>(gridDim.x)) {
      block_counter_store(&control->all_started, 1);
      return;
    }
    __nanosleep(kNanoseconds);
  }
}

// What is shared out by block number.
enum class Share { first_phase, attention, second_phase, combination };

// The number of a block whose share is to be done here too, or -1 if no more are late. Each late
// block's is given to one.
__device__ __forceinline__ int next_late(const LayerParams& layer, SharedControl* control,
                                         Share share) {
  if (block_counter_load(&control->all_started) != 0) return -1;
  const int half = control->scratch_half;
  std::uint32_t* given = layer.stream.tickets + half * kLayerCounters + kLayerPhases;
  const auto blocks = static_cast<int>(gridDim.x);
  const int number = blocks - 1 - static_cast<int>(atomicAdd(given + static_cast<int>(share), 1u));
  const int started = blocks_started(layer, half);
  if (started == blocks) block_counter_store(&control->all_started, 1);
  // Blocks of lower numbers have started too then.
  return number >= started ? number : -1;
}

// By one thread of each block: brings into L2 what its producer will read first. Where attention
// comes, more would be in the way of what the launch before still reads.
__device__ __forceinline__ void prefetch_first_chunks(const LayerParams& layer) {
  const int count = layer.attention_and_up ? 4 : 8;
  const DecodeParams& p = layer.stream;
  const StreamedMatrix& matrix = layer.attention_and_up ? p.qkv : p.mlp_down;
  const char* weights = layer.attention_and_up ? p.first_layer.qkv : p.first_layer.mlp_down;
  const int chunk_bytes = matrix.rows_per_chunk * matrix.row_bytes;
  for (int i = 0; i < count; ++i) {
    const int chunk = static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
    if (chunk + 1 >= matrix.chunks) return;  // the last one may be shorter
    bulk_prefetch(weights + static_cast<std::int64_t>(chunk) * chunk_bytes, chunk_bytes);
  }
}

// Streams before it knows the position.
template <typename Cache>
class LayerWorkScheduler : public WorkScheduler<Cache> {
  using Base = WorkScheduler<Cache>;
  using Base::cache, Base::control, Base::counter, Base::p;

 public:
  __device__ __forceinline__ LayerWorkScheduler(const LayerParams& params, const Cache& kv_cache,
                                                SharedControl* shared)
      : Base(params.stream, kv_cache, shared), layer(params) {
    counter += control->scratch_half * kLayerCounters;
  }

  __device__ __forceinline__ void run() {
    const int position = layer.attention_and_up ? position_of(layer) : 0;
    Hooks hooks{*this, position};
    // Alone, the first half has attention between the rows of the MLP's matrix, late enough that
    // QKV is there, so that it does not come last; with the second half, that hides it.
    // The loop is one copy of the code for both phases: it must fit into few registers.
    if (!layer.down) hooks.attention_from = p.qkv.chunks + p.mlp_up.chunks * 3 / 8;
#pragma unroll 1
    for (int index = layer.attention_and_up ? 0 : 1; index < 2; ++index) {
      plan::Phase phase = plan::layer_phase(true, index);
      if (index == 1 && layer.attention_and_up) {
        if (!cache.is_inside(position)) break;
        hooks.attend();
        block_counter_store(&control->attended, 1);
        if (!layer.down) phase = {Stream::attention_out};
        hooks.share = Share::second_phase;
        hooks.none_late = !layer.down;
      } else if (index == 1) {
        phase = {Stream::mlp_down};
        hooks.none_late = true;
      }
      this->schedule_phase(0, 0, static_rounds_in_first_matrix(this->schedule_of(phase)), hooks);
    }
    this->end();
  }

 private:
  // The static shares of several blocks may come one after the other, so none may reach into a
  // phase's second matrix.
  __device__ __forceinline__ SharedControl::PhaseSchedule static_rounds_in_first_matrix(
      SharedControl::PhaseSchedule phase) const {
    const auto blocks = static_cast<int>(gridDim.x);
    const int chunks = control->matrices[static_cast<int>(phase.first)].chunks;
    phase.first_dynamic = min(phase.first_dynamic, chunks / blocks * blocks);
    return phase;
  }

  struct Hooks {
    LayerWorkScheduler& scheduler;
    int position;
    int attention_from = kNever;  // the first chunk behind attention
    Share share = Share::first_phase;
    bool attended = false;
    bool none_late = false;  // in this phase, or nobody waits for them

    // Attention waits for QKV's rows, so with late blocks it comes behind all of a phase.
    __device__ __forceinline__ void before_chunk(int chunk) {
      if (chunk >= attention_from && !attended &&
          block_counter_load(&scheduler.control->all_started) != 0)
        attend();
    }
    __device__ __forceinline__ void attend() {
      if (attended || !scheduler.cache.is_inside(position)) return;
      attended = true;
      const plan::AttentionSplits splits = splits_at(scheduler.p, position);
      int number = scheduler.cache.block_number();
#pragma unroll 1
      do {
        scheduler.schedule_attention(0, 0, splits, number);
        number = cuda::next_late(scheduler.layer, scheduler.control, Share::attention);
      } while (number >= 0);
    }
    __device__ __forceinline__ bool next_late(int& number) {
      if (none_late) return false;
      const int late = cuda::next_late(scheduler.layer, scheduler.control, share);
      none_late = late < 0;
      if (!none_late) number = late;
      return !none_late;
    }
  };

  const LayerParams& layer;
};

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache>
class LayerStep : public DecodeStep<T, kMaxIterations, kMaxHeadSteps, Cache, T> {
  using Base = DecodeStep<T, kMaxIterations, kMaxHeadSteps, Cache, T>;
  using Base::cache, Base::control, Base::next_id, Base::p, Base::ring, Base::set_shift,
      Base::thread, Base::x;
  using typename Base::Frag;
  using typename Base::Moments;

 public:
  __device__ __forceinline__ LayerStep(const LayerParams& params, const Cache& kv_cache,
                                       char* shared)
      : Base(params.stream, kv_cache, shared), layer(params) {}

  __device__ __forceinline__ void consume() {
    if (!layer.attention_and_up) {
      next_id = ring.announcement().id;
      down_only();
      return;
    }
    set_shift = control->scratch_half;
    const int position = position_of(layer);
    this->load_norms(0, 0);
    load_input();
    next_id = ring.announcement().id;
    if (!multiply_normed(position))
      refuse();
    else if (layer.down)
      second_half();
    else
      project_attention();
  }

 private:
  // For a position that is not one: every result is NaN (the MLP's activations are already), the
  // caches stay as they are.
  __device__ __forceinline__ void refuse() const {
    fill_nan(layer.attn_output, p.hidden_size);
    fill_nan(layer.output, p.hidden_size);
    fill_nan(layer.k_new, p.hidden_size);
    fill_nan(layer.v_new, p.hidden_size);
  }

  __device__ __forceinline__ void fill_nan(void* vector, int count) const {
    if (vector == nullptr) return;
    for (int i = control->block_number * kConsumerThreads + thread; i < count;
         i += static_cast<int>(gridDim.x) * kConsumerThreads)
      static_cast<T*>(vector)[i] = static_cast<T>(NAN);
  }

  __device__ __forceinline__ static const T* typed(const void* vector) {
    return static_cast<const T*>(vector);
  }

  // QKV, the first MLP matrix and, in between or behind, attention. The MLP's activations go to the
  // caller, or to the second half. Gives whether there is such a position.
  __device__ __forceinline__ bool multiply_normed(int position) {
    const Moments moments = this->moments(false);
    this->normalise(moments, this->norms.input, 0);
    this->normalise(moments, this->norms.post, 1);
    this->norms = {};
    this->consumer_barrier();
    Frag fragments;
    this->load_normed(p.qkv, 0, fragments);
    float* qkv = this->template lamport<float>(p.layout.qkv);
    this->multiply(Stream::qkv, p.qkv, fragments,
                   [&](int row, float value) { lamport_store(qkv + row, value); });
    const bool valid = cache.is_inside(position);
    T* mlp = this->template lamport<T>(p.layout.mlp);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      if (this->is_next(Stream::mlp_up)) {
        this->load_normed(p.mlp_up, 1, fragments);
        this->multiply(Stream::mlp_up, p.mlp_up, fragments, [&](int row, float value) {
          const T rounded = static_cast<T>(valid ? activate(p.activation, value) : NAN);
          if (layer.down)
            lamport_store(mlp + operand_order(row), rounded);
          else
            static_cast<T*>(layer.mlp_intermediate)[row] = rounded;
        });
      }
      if (part == 0) this->attend(0, position);
    }
    return valid;
  }

  // Of the first half alone.
  __device__ __forceinline__ void project_attention() {
    if (!this->is_next(Stream::attention_out)) return;
    Frag fragments;
    this->request_activations(p.attention_out, p.layout.attention, fragments);
    this->await_activations(p.attention_out, p.layout.attention, fragments);
    this->multiply(Stream::attention_out, p.attention_out, fragments, [&](int row, float value) {
      static_cast<T*>(layer.attn_output)[row] = static_cast<T>(value);
    });
  }

  __device__ __forceinline__ void second_half() {
    Frag next;
    float* mlp = this->template lamport<float>(p.layout.delta_mlp);
    float* attention = this->template lamport<float>(p.layout.delta_attention);
    if (this->is_next(Stream::mlp_down)) {
      Frag fragments;
      this->request_activations(p.mlp_down, p.layout.mlp, fragments);
      this->await_activations(p.mlp_down, p.layout.mlp, fragments);
      this->multiply(Stream::mlp_down, p.mlp_down, fragments,
                     [&](int row, float value) { lamport_store(mlp + row, value); });
    }
    if (this->is_next(Stream::attention_out)) {
      this->request_activations(p.attention_out, p.layout.attention, next);
      this->await_activations(p.attention_out, p.layout.attention, next);
      this->multiply(Stream::attention_out, p.attention_out, next,
                     [&](int row, float value) { lamport_store(attention + row, value); });
    }
    // The sum, each element by one thread: to each block a piece.
    const int piece =
        (p.hidden_size + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    const int begin = control->block_number * piece;
    for (int i = begin + thread; i < min(begin + piece, p.hidden_size); i += kConsumerThreads) {
      const float input = static_cast<float>(typed(layer.input)[i]);
      const float sum = input + lamport_wait(attention + i) + lamport_wait(mlp + i);
      static_cast<T*>(layer.output)[i] = static_cast<T>(sum);
    }
  }

  __device__ __forceinline__ void down_only() {
    if (!this->is_next(Stream::mlp_down)) return;
    Frag fragments;
    load_plain(p.mlp_down, typed(layer.mlp_input), fragments);
    this->multiply(Stream::mlp_down, p.mlp_down, fragments, [&](int row, float value) {
      const float sum = static_cast<float>(typed(layer.input)[row]) +
                        static_cast<float>(typed(layer.attn_input)[row]) + value;
      static_cast<T*>(layer.output)[row] = static_cast<T>(sum);
    });
  }

  __device__ __forceinline__ void load_input() {
    const auto* row = static_cast<const std::uint32_t*>(layer.input);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      x[j] = make_float2(0.0f, 0.0f);
      if (this->holds(j)) x[j] = unpack<T>(__ldg(row + this->element(j) / 2));
    }
  }

  // Fragments of a vector that is not in operand order.
  __device__ __forceinline__ void load_plain(const StreamedMatrix& matrix, const T* vector,
                                             Frag& fragments) const {
    const T* first = vector + this->lane_column(matrix);
    const int swap = this->swap_columns(matrix);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      uint4 words = make_uint4(0, 0, 0, 0);
      if (i < matrix.iterations)
        words = __ldg(reinterpret_cast<const uint4*>(first + i * 32 + (i % 2 == 0 ? swap : -swap)));
      fragments.value[i] = make_uint4(words.x, words.z, words.y, words.w);
    }
  }

  const LayerParams& layer;
};

// The combiner's part, if there are splits.
template <typename T, typename Cache>
__device__ __forceinline__ void combine_layer(const LayerParams& layer, const Cache& cache,
                                              SharedControl* control, int lane) {
  if (!layer.attention_and_up) return;
  const int position = position_of(layer);
  cache.find_row(position, lane);
  if (!cache.is_inside(position)) return;
  const int splits = splits_at(layer.stream, position).splits;
  if (splits == 1) return;
  const SplitCombiner<T> combiner(layer.stream, control);
  const int half = control->scratch_half;
  combiner.combine(half, 0, splits, control->block_number);
  // Whose share comes late is known when attention is over: then this waits for nothing else.
  block_counter_wait(&control->attended, 1, kBackoffNanoseconds);
  int number = 0;
  while (true) {
    if (lane == 0) number = next_late(layer, control, Share::combination);
    number = __shfl_sync(kAllLanes, number, 0);
    if (number < 0) return;
    combiner.combine(half, 0, splits, number);
  }
}

// Clears the half of the scratch that the launch before has used.
__device__ __forceinline__ void clear_other_half(const LayerParams& p, const SharedControl* control,
                                                 int lane) {
  const int before = 1 - control->scratch_half;
  char* set = lamport_set(p.stream, before);
  const uint4 not_ready = make_uint4(kNotReady, kNotReady, kNotReady, kNotReady);
  for (int offset = (control->block_number * 32 + lane) * 16; offset < p.stream.layout.bytes;
       offset += static_cast<int>(gridDim.x) * 32 * 16)
    *reinterpret_cast<uint4*>(set + offset) = not_ready;
  if (control->block_number == 0 && lane < kLayerCounters)
    p.stream.tickets[before * kLayerCounters + lane] = 0;
}

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache>
__global__ void __launch_bounds__(kDecodeBlockThreads, 1)
    layer_kernel(const __grid_constant__ LayerParams params) {
  extern __shared__ __align__(128) char shared[];
  SharedControl* control = shared_control(shared);
  if (threadIdx.x == 0) init_shared(params.stream, shared);
  if (threadIdx.x == 32) init_sources(params.stream, control);
  if (threadIdx.x == 64) start_block<Cache::kInPages>(params, control);
  // Without dependent launches there is no time before the first copies.
  if (kBulkCopies && threadIdx.x == kConsumerThreads) prefetch_first_chunks(params);
  __syncthreads();
  const Cache cache{params, control};
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < plan::kConsumerWarps) {
    take_registers<kConsumerRegisters>();
    wait_for_dependencies();
    LayerStep<T, kMaxIterations, kMaxHeadSteps, Cache>(params, cache, shared).consume();
    return;
  }
  give_up_registers<kProducerRegisters>();
  wait_for_dependencies();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  switch (warp - plan::kConsumerWarps) {
    case 0:
      if (is_producer()) produce(params.stream, cache, control);
      break;
    case 1:
      // Where only the second half runs, no block waits for another.
      if (lane == 0 && params.attention_and_up) watch_starts(params, control);
      __syncwarp();
      clear_other_half(params, control, lane);
      break;
    case 2: combine_layer<T>(params, cache, control, lane); break;
    default:
      if (elect_one()) LayerWorkScheduler(params, cache, control).run();
  }
}

}  // namespace clusterfusion::cuda
