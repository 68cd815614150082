// The streaming decode step: one block on each SM, all layers, one launch for many tokens.
//
// Roles of a block's warps
//   8 consumers        multiply what has landed in the ring, on the tensor cores
//   1 work scheduler   announces which weight chunks and KV blocks come into the ring; it needs no
//                      result to know that, so memory never waits
//   1 producer         copies them, with bulk copies where there are any
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

#include "backend/cuda/decode/buffer_clearer.cuh"
#include "backend/cuda/decode/choose_token.cuh"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/decode/paged_cache.cuh"
#include "backend/cuda/decode/producer.cuh"
#include "backend/cuda/decode/split_combiner.cuh"
#include "backend/cuda/decode/work_scheduler.cuh"
#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/ptx/registers.cuh"

namespace clusterfusion::cuda {

inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;

// All steps of a launch, by the consumers.
template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache = PagedCache,
          typename Bias = float, plan::LayerKind kKind = plan::LayerKind::plain>
class DecodeStep : public DecodeChoice<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeChoice<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

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
  using Base::add_pending_updates, Base::attend, Base::await_activations, Base::begin_epoch,
      Base::best, Base::choose_token, Base::consumer_barrier, Base::control,
      Base::discard_prefetched, Base::embed, Base::epoch, Base::input_of_part, Base::is_next,
      Base::kPairs, Base::load_normed, Base::load_norms, Base::make_indices_opaque, Base::mark,
      Base::mean_before, Base::moments, Base::multiply, Base::next_id, Base::normalise, Base::norms,
      Base::norms_loaded, Base::p, Base::request_activations, Base::ring, Base::thread;
  using typename Base::Frag;
  using typename Base::LayerNorms;
  using typename Base::Moments;

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
            if constexpr (kKind == plan::LayerKind::any) {
              // Nothing is requested before attention: tells the compiler.
              requested = false;
              fragments = Frag{};
            }
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
    if (!norms_loaded) load_norms(index, part);
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
    const bool both = p.parallel_residual && index < p.num_layers;
    if constexpr (kKind == plan::LayerKind::any) {
      normalise(m, norms.input, input_of_part(part));
      if (both) {
        load_norms(index, 1);
        normalise(m, norms.input, 1);
      }
    } else {
      if (part == 0) normalise(m, norms.input, 0);
      if (part == 1 || both) normalise(m, norms.post, 1);
    }
    norms = LayerNorms{};
    norms_loaded = false;
    consumer_barrier();
    mark(TimelinePoint::normalised);
  }

  // A stream's activations, whose loads may have been issued already.
  __device__ __forceinline__ void load_input(Stream stream, const StreamedMatrix& matrix,
                                             Frag& fragments, bool requested) {
    const bool from_buffer = stream == Stream::mlp_down || stream == Stream::attention_out;
    if (from_buffer) {
      const std::int32_t source = stream == Stream::mlp_down ? p.layout.mlp : p.layout.attention;
      if (!requested) request_activations(matrix, source, fragments);
      await_activations(matrix, source, fragments);
      mark(stream == Stream::mlp_down ? TimelinePoint::mlp : TimelinePoint::attention_in);
    } else {
      load_normed(matrix, input_of_part(stream == Stream::mlp_up), fragments);
    }
  }

  __device__ __forceinline__ void multiply_stream(Stream stream, int index, int step, int position,
                                                  Frag& fragments, bool& requested) {
    make_indices_opaque();
    const StreamedMatrix& matrix = control->matrices[static_cast<int>(stream)];
    load_input(stream, matrix, fragments, requested);
    requested = false;
    float* result = nullptr;
    TimelinePoint done = TimelinePoint::qkv;
    switch (stream) {
      case Stream::qkv: result = this->template lamport<float>(p.layout.qkv); break;
      case Stream::mlp_up: done = TimelinePoint::mlp_up; break;
      case Stream::mlp_down:
        result = this->template lamport<float>(p.layout.delta_mlp);
        done = TimelinePoint::mlp_down;
        break;
      case Stream::attention_out:
        result = this->template lamport<float>(p.layout.delta_attention);
        done = TimelinePoint::attention_out;
        break;
      default:
        if (p.logits != nullptr)
          result = p.logits + static_cast<std::int64_t>(step - p.first_scored_step) * p.vocab_size;
    }
    multiply(
        stream, matrix, fragments,
        [&](int row, float value, float beside_gate = 1.0f) {
          if (stream == Stream::mlp_up) {
            float activated = control->ablates_mlp ? 0.0f : activate(p.activation, value);
            if constexpr (kKind == plan::LayerKind::any) activated *= beside_gate;
            lamport_store(this->template lamport<T>(p.layout.mlp) + operand_order(row),
                          static_cast<T>(activated));
            return;
          }
          if (result != nullptr) lamport_store(result + row, value);
          if (stream != Stream::lm_head) return;
          const Candidate here = candidate(p, position, row, value);
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
            load_norms(index + 1, 0);
            norms_loaded = true;
          }
        });
    mark(done);
  }

  // The LM head's epoch where no logits are wanted.
  __device__ __forceinline__ void pass_epoch() {
    consumer_barrier();
    begin_epoch();
    consumer_barrier();
    ++epoch;
  }
};

template <typename T, int kMaxIterations, int kMaxHeadSteps, plan::LayerKind kKind>
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
    DecodeStep<T, kMaxIterations, kMaxHeadSteps, PagedCache, float, kKind>(params, cache, shared)
        .consume();
    return;
  }
  give_up_registers<kProducerRegisters>();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  switch (warp - plan::kConsumerWarps) {
    case 0:
      if (is_producer()) produce<kKind>(params, cache, control);
      break;
    case 1: clear_buffers(params, control, lane); break;
    case 2: SplitCombiner<T>(params, control).run(); break;
    default:
      if (elect_one()) WorkScheduler<PagedCache, kKind>(params, cache, control).run();
  }
}

}  // namespace clusterfusion::cuda
