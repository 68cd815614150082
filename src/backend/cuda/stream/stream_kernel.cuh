// The streaming decode step for 1 to 16 rows: one block on each SM, all layers, one launch for many
// tokens. A row is one token of one sequence at one position; a row's result has the same bits
// whatever is computed beside it.
//
// Roles of a block's warps
//   8 consumers        multiply what has landed in the ring, on the tensor cores; attention;
//                      LayerNorm
//   1 work scheduler   announces which pieces of weights and KV blocks come into the ring; it needs
//                      no result to know that, so memory never waits
//   1 producer         copies them with bulk copies
//   1 buffer clearer   makes Lamport buffers, which carry results between blocks, usable again,
//                      and is a split combiner
//   1 split combiner   merges the splits of a long context's attention
//   4 reducers         add up the consumers' partial sums of a chunk, and run the epilogue
// Every sum has a fixed order, whoever makes it, so the same input gives the same bits. There is no
// grid barrier: a block waits for the elements it reads, no more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/decode/buffer_clearer.cuh"
#include "backend/cuda/ptx/registers.cuh"
#include "backend/cuda/stream/attention.cuh"
#include "backend/cuda/stream/matrix_product.cuh"
#include "backend/cuda/stream/producer.cuh"
#include "backend/cuda/stream/reducer.cuh"
#include "backend/cuda/stream/residual.cuh"
#include "backend/cuda/stream/shared_setup.cuh"
#include "backend/cuda/stream/split_combiner.cuh"
#include "backend/cuda/stream/work_scheduler.cuh"

namespace clusterfusion::cuda::stream {

// Registers of a thread by role: of two warpgroups of consumers, of the one of the scheduler and
// its like, and of the reducers, 512 in all. What a role spills comes back behind the weights.
template <int kOperandRows, int kPieces>
struct Registers {
  static constexpr bool kMany = kOperandRows * kPieces > 32;
  static constexpr bool kFew = kOperandRows * kPieces <= 16;
  static constexpr int kConsumer = kMany ? 208 : kFew ? 184 : 192;
  static constexpr int kScheduler = kMany ? 48 : kFew ? 72 : 64;
  static constexpr int kReducer = 512 - 2 * kConsumer - kScheduler;
};

template <typename T, int kOperandRows, int kPieces, int kHeadSteps>
class DecodeStep {
 public:
  // Two elements a thread and pair: 512 of hidden_size, which is at most 5120.
  static constexpr int kPairs = kPieces <= 2 ? 5 : 10;

  using Residual = stream::Residual<T, kPairs>;
  using Product = MatrixProduct<T, kOperandRows, kPieces>;
  using Attention =
      stream::Attention<T, kHeadSteps, plan::max_task_queries(16 * kHeadSteps, kOperandRows)>;

  // The parts are variables of their own: an object that held a part and a reference to it would
  // lie in memory, not in registers.
  __device__ __forceinline__ DecodeStep(Consumer& consumer, Residual& its_residual,
                                        Product& its_product, Attention& its_attention)
      : c(consumer), residual(its_residual), product(its_product), attention(its_attention) {}

  // All steps of the launch.
  __device__ __forceinline__ void run() {
    const StreamParams& p = c.p;
    c.await_announcement();
    int token = residual.holds_row() ? c.control->rows[residual.row].token : 0;
    for (int step = 0; step < p.steps; ++step) {
      if (residual.holds_row()) residual.embed(token);
      attention.plan_step(step);
#pragma unroll 1
      for (int layer = 0; layer <= p.num_layers; ++layer, ++c.epoch) {
        c.mark(StreamPoint::begin);
        run_layer(layer);
        if (layer < p.num_layers) continue;
        product.partials.tell_all(c.warp, c.lane, kEndOfHead);
        if (!residual.holds_row()) continue;
        token = residual.choose_token();
        if (c.thread == 0 && is_reporter()) p.chosen[step * p.rows + residual.row] = token;
      }
    }
    product.partials.tell_all(c.warp, c.lane, kRingEnd);
  }

 private:
  // The phases of a layer, or of the LM head behind the last one.
  __device__ __forceinline__ void run_layer(int layer) {
    const int phases = plan::layer_phases(c.p.parallel_residual);
    const bool is_lm_head = layer == c.p.num_layers;
    const int end = is_lm_head ? phases + 1 : phases;
#pragma unroll 1
    for (int index = is_lm_head ? phases : 0; index < end; ++index) {
      const StreamPhase& phase = c.control->phases[index];
      if (phase.normalizes) {
        residual.normalize(layer, index);
        c.mark(StreamPoint::normalised);
      }
      if (phase.attention_before) {
        if (c.is_next(kAttentionPhase)) attention.run(layer, product.partials);
        c.mark(StreamPoint::attention);
      }
      product.run(index, index == 0 ? StreamPoint::first_input : StreamPoint::second_input);
      c.mark(index == 0 ? StreamPoint::first_phase : StreamPoint::second_phase);
    }
  }
  __device__ __forceinline__ bool is_reporter() const {
    return !keeps_residual_everywhere(c.p) || blockIdx.x == 0;
  }

  Consumer& c;
  Residual& residual;
  Product& product;
  Attention& attention;
};

template <typename T, int kOperandRows, int kPieces, int kHeadSteps>
__global__ void __launch_bounds__(kStreamBlockThreads, 1)
    stream_kernel(const __grid_constant__ StreamParams params) {
  if constexpr (!kWarpgroups) return;  // what it needs of registers is sm_90a's setmaxnreg
  extern __shared__ __align__(128) char shared[];
  using Counts = Registers<kOperandRows, kPieces>;
  StreamShared* control = shared_control(shared);
  SharedSetup(params, shared, kOperandRows / params.rows).run();
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < plan::kConsumerWarps) {
    take_registers<Counts::kConsumer>();
    using Step = DecodeStep<T, kOperandRows, kPieces, kHeadSteps>;
    Consumer consumer(params, shared);
    typename Step::Residual residual(consumer);
    typename Step::Product product(consumer);
    typename Step::Attention attention(consumer);
    Step(consumer, residual, product, attention).run();
    return;
  }
  const int role = warp - plan::kConsumerWarps;
  if (role >= 4) {
    give_up_registers<Counts::kReducer>();
    Reducer<T, kOperandRows>(params, control, shared_scratch(shared), role - 4).run();
    return;
  }
  give_up_registers<Counts::kScheduler>();
  if (role == 0) {
    if (is_producer()) produce(params, control);
  } else if (role == 1) {
    Combiner<T> combiner(params, control, 1);
    clear_buffers(params, control, static_cast<int>(threadIdx.x) % 32,
                  [&](int epoch) { combiner.combine(epoch); });
  } else if (role == 2) {
    Combiner<T>(params, control, 0).run();
  } else if (elect_one()) {
    WorkScheduler(params, control).run();
  }
}

}  // namespace clusterfusion::cuda::stream
