// The reducers: warps that add up the consumer warps' sums of a chunk, in order of the warps, and
// do with the results what comes next: the activation, the way to other SMs, the choice of a token.
// They need nothing that the consumers would wait for.
#pragma once

#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/choose_token.cuh"
#include "backend/cuda/stream/partial_sums.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

template <typename T, int kOperandRows>
class Reducer {
 public:
  using Sums = PartialSums;

  __device__ __forceinline__ Reducer(const StreamParams& params, StreamShared* shared,
                                     char* scratch, int number)
      : p(params),
        control(shared),
        scratch(scratch),
        number(number),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    best() = worst_candidate();
    for (std::uint32_t parity = 0;; parity ^= 1) {
      mbarrier_wait(&control->partial_full[number], parity);
      const int2 what = control->partial_what[number];
      if (what.x == kRingEnd) return;
      if (what.x == kEndOfHead)
        publish_candidates();
      else
        reduce(what);
      __syncwarp();
      if (kEveryLaneArrives || lane == 0) mbarrier_arrive(&control->partial_empty[number]);
    }
  }

 private:
  // In shared memory: this warp has few registers.
  __device__ __forceinline__ Candidate& best() { return control->best[number][lane]; }

  // This lane's results: matrix row lane % 8 of the chunk, for rows lane / 8, lane / 8 + 4, ...
  __device__ __forceinline__ void reduce(const int2& what) {
    const int epoch = epoch_of(what.x);
    const Operand& operand = control->operands[phase_of(what.x)][operand_of(what.x)];
    const int slots = operand.slots, slots_log2 = slots >> 1;  // 1, 2 or 4
    const int index = (what.y * plan::kChunkRows + lane % 8) >> slots_log2;
    const int width = operand.rows >> slots_log2;
    const bool is_valid = index < width && (lane & (slots - 1)) == 0;
    const Stream stream = operand.stream;
    char* output = lamport_set(p, epoch) + operand.output;
    if (stream == Stream::lm_head) {
      // Not unrolled: the noise is long.
#pragma unroll 1
      for (int k = 0; 4 * k < p.rows; ++k) take_logit(k, index, sum(k), is_valid, epoch);
      return;
    }
    float value[kOperandRows / 4] = {};
#pragma unroll
    for (int k = 0; k < kOperandRows / 4; ++k)
      if (4 * k < p.rows) value[k] = folded(sum(k), slots);
    if (stream == Stream::mlp_up)
      store_activated(value, output, index, is_valid, mlp_is_ablated(epoch));
    else
      store(value, reinterpret_cast<float*>(output) + index, width, is_valid);
  }

  // The sum of the parts of one row, which lie in `slots` lanes side by side, in their order.
  __device__ __forceinline__ static float folded(float value, int slots) {
    float total = value;
    for (int part = 1; part < slots; ++part) total += __shfl_down_sync(kAllLanes, value, part);
    return total;
  }

  // What the warps have of this lane's element of row 4 k + lane / 8, in their order.
  __device__ __forceinline__ float sum(int k) const {
    float value = 0.0f;
    if (4 * k + lane / 8 >= p.rows) return value;
    const float* sums = Sums::of_warp(scratch, number, 0, p.rows) + 32 * k + lane;
#pragma unroll
    for (int warp = 0; warp < plan::kConsumerWarps; ++warp)
      value += sums[warp * p.rows * plan::kChunkRows];
    return value;
  }

  // Values of rows lane / 8, lane / 8 + 4, ...
  __device__ __forceinline__ void store(const float (&value)[kOperandRows / 4], float* output,
                                        int width, bool is_valid) const {
#pragma unroll
    for (int k = 0; k < kOperandRows / 4; ++k) {
      const int row = 4 * k + lane / 8;
      if (is_valid && row < p.rows)
        lamport_store(output + static_cast<std::int64_t>(row) * width, value[k]);
    }
  }
  __device__ __forceinline__ void store_activated(float (&value)[kOperandRows / 4], char* output,
                                                  int index, bool is_valid, bool is_ablated) const {
    // Not unrolled: activations are long, and instructions come from as far as data.
#pragma unroll 1
    for (int row = lane / 8; row - lane / 8 < p.rows; row += 4) {
      if (is_valid && row < p.rows)
        lamport_store(reinterpret_cast<T*>(output) + input_place(p, row, index),
                      static_cast<T>(is_ablated ? 0.0f : activate(p.activation, value[0])));
#pragma unroll
      for (int k = 0; k + 1 < kOperandRows / 4; ++k) value[k] = value[k + 1];
    }
  }

  // The MLP of this epoch's layer.
  __device__ __forceinline__ bool mlp_is_ablated(int epoch) const {
    return p.ablated.any && p.ablated.has_mlp(epoch % epochs_per_step(p));
  }

  // For whole warps. Lane 8 j + k keeps the best of row 4 k + j.
  __device__ __forceinline__ void take_logit(int k, int token, float logit, bool is_valid,
                                             int epoch) {
    const int row = 4 * k + lane / 8;
    const int step = epoch / epochs_per_step(p);
    Candidate here = worst_candidate();
    if (is_valid && row < p.rows) {
      if (p.logits != nullptr && step + 1 == p.steps)
        p.logits[static_cast<std::int64_t>(row) * p.logits_stride + token] = logit;
      const StreamedRow& of_row = control->rows[row];
      here = candidate(of_row, of_row.position + step, token, logit);
    }
    here = best_of_lanes<8>(here);
    if (lane % 8 == k && better(here, best())) best() = here;
  }

  // A reducer that had no chunk of the LM head knows its epoch all the same: the heads follow each
  // other.
  __device__ __forceinline__ void publish_candidates() {
    const int epoch = heads * epochs_per_step(p) + p.num_layers;
    ++heads;
    const int row = 4 * (lane % 8) + lane / 8;
    if (row < p.rows)
      publish_candidate(candidates_of(p, epoch, row) +
                            2 * (static_cast<int>(blockIdx.x) * kReducerWarps + number),
                        best());
    best() = worst_candidate();
  }

  const StreamParams& p;
  StreamShared* control;
  char* scratch;
  int number, lane;
  int heads = 0;
};

}  // namespace clusterfusion::cuda::stream
