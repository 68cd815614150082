// What the roles of the streaming decode kernel share: shared memory, the ids of what streams, and
// where things lie.
#pragma once

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/decode/epoch.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/sync/counter.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"
#include "backend/cuda/sync/ring.cuh"

namespace clusterfusion::cuda {

using namespace device;
using plan::Stream;

// Shared memory: control, activations, sums, ring. The sizes are those of DecodePlan.
inline constexpr int kNumStreams = static_cast<int>(Stream::none);

// As many as consumers may not have finished, and as there may be in the ring.
inline constexpr int kKnownChunks = 256;
static_assert(kKnownChunks >= kMaxChunkSlots + kMaxRingStages);
static_assert(plan::kMaxStages <= kMaxRingStages);

struct SharedControl {
  RingControl ring;
  float2 reduce[2][plan::kConsumerWarps];
  Candidate candidate[plan::kConsumerWarps];
  // Of the last matrix chunks that the work scheduler has announced, in its order: which one.
  int chunks[kKnownChunks];
  unsigned finished_chunks;  // consumers have finished the rows of so many
  // By Stream: which one comes is known only when it comes, and a look into parameters by index
  // would be one into memory.
  StreamedMatrix matrices[kNumStreams];
  bool has_bias[kNumStreams];
  // What the work scheduler must know of a phase and of its matrices. Here, because it needs it at
  // when a phase begins: parameters would have to be fetched again, behind the weights.
  struct Source {
    const char* weights;
    const char* biases;  // null if there are none
  };
  Source sources[kNumStreams];  // of the first layer
  struct PhaseSchedule {
    Stream first, second;
    int chunks;         // of both
    int first_dynamic;  // of them
    int late_from;      // from this one on p.late_in_flight copies may be under way
    bool attention_before;
  };
  PhaseSchedule phases[kMaxPhases];
  // Of attention, by step: the work scheduler of a small model may be many steps ahead.
  plan::AttentionSplits splits[kStepsOfLaunch];
  int leave_from;  // of the step's layers (WorkScheduler::leaves_first_phase_from)
  int token;
  bool ablates_mlp;  // of this epoch's layer
  // Consumers multiply what has landed: nobody here waits for what crosses between SMs. Of layers
  // of any kind.
  std::uint32_t multiplies;
  std::uint32_t opaque_zero;  // 0: see DecodeStep::opaque_zero()
  // Epochs that the consumers have begun: what they wrote and read in earlier ones is done.
  std::uint32_t begun;
  // Epochs e that all blocks have begun, as this block knows: the Lamport set of epoch e + 1 is
  // clear and may be used, and KV entries of the epochs before e may be streamed.
  std::uint32_t cleared;
  // Of the layer kernel, which says what they are (ops/layer_kernel.cuh): numbers that do not
  // change, and flags that rise.
  int block_number, scratch_half;
  std::uint32_t all_started, attended;
  std::uint32_t row_found;  // row_position is known: of caches in pages
  int row_position;         // of the new token; -1: there is no such place
};
static_assert(sizeof(SharedControl) <= plan::kControlBytes);

__device__ __forceinline__ SharedControl* shared_control(char* shared) {
  return reinterpret_cast<SharedControl*>(shared);
}
__device__ __forceinline__ float* shared_sums(const DecodeParams& p, char* shared) {
  return reinterpret_cast<float*>(shared + plan::kControlBytes + p.input_bytes);
}
__device__ __forceinline__ char* shared_ring(const DecodeParams& p, char* shared) {
  return reinterpret_cast<char*>(shared_sums(p, shared) + p.sum_slots);
}

// By one thread, before a block barrier.
__device__ __forceinline__ void init_shared(const DecodeParams& p, char* shared) {
  SharedControl* control = shared_control(shared);
  ring_init(&control->ring, shared_ring(p, shared), p.stages, p.stage_bytes, plan::kConsumerWarps);
  control->matrices[static_cast<int>(Stream::qkv)] = p.qkv;
  control->matrices[static_cast<int>(Stream::mlp_up)] = p.mlp_up;
  control->matrices[static_cast<int>(Stream::mlp_down)] = p.mlp_down;
  control->matrices[static_cast<int>(Stream::attention_out)] = p.attention_out;
  control->matrices[static_cast<int>(Stream::lm_head)] = p.lm_head;
  control->begun = control->cleared = control->opaque_zero = control->finished_chunks = 0;
  control->multiplies = 0;
}
// By another one.
__device__ __forceinline__ void init_sources(const DecodeParams& p, SharedControl* control) {
  const auto set = [&](Stream stream, const char* weights, const char* biases) {
    control->sources[static_cast<int>(stream)] = {weights, biases};
    control->has_bias[static_cast<int>(stream)] = biases != nullptr;
  };
  const StreamedLayer& layer = p.first_layer;
  set(Stream::qkv, layer.qkv, layer.qkv_bias);
  set(Stream::mlp_up, layer.mlp_gate != nullptr ? layer.mlp_gate : layer.mlp_up, layer.mlp_up_bias);
  set(Stream::mlp_down, layer.mlp_down, layer.mlp_down_bias);
  set(Stream::attention_out, layer.attention_out, layer.attention_out_bias);
  set(Stream::lm_head, p.lm_head_weight, nullptr);
}
// The id of a ring stage: what it holds, and of which epoch.
__device__ __forceinline__ int ring_id(int epoch, plan::Stream stream) {
  return epoch * 8 + static_cast<int>(stream);
}

// The parts of such an id; the stream as a number.
__device__ __forceinline__ int epoch_of(int ring_id) { return ring_id / 8; }
__device__ __forceinline__ int stream_of(int ring_id) { return ring_id % 8; }

__device__ __forceinline__ plan::AttentionSplits splits_at(const DecodeParams& p, int position) {
  return plan::attention_splits(position + 1, p.kv_block_positions, p.num_kv_heads, p.head_dim,
                                gridDim.x);
}

// Pointers that are null in the first layer are not in the others: ask the first.
__device__ __forceinline__ StreamedLayer layer_at(const DecodeParams& p, int layer) {
  const StreamedLayer& first = p.first_layer;
  return {of_layer(p, first.qkv, layer),
          of_layer(p, first.attention_out, layer),
          of_layer(p, first.mlp_up, layer),
          of_layer(p, first.mlp_down, layer),
          of_layer(p, first.input_norm_weight, layer),
          of_layer(p, first.input_norm_bias, layer),
          of_layer(p, first.post_norm_weight, layer),
          of_layer(p, first.post_norm_bias, layer),
          of_layer(p, first.qkv_bias, layer),
          of_layer(p, first.attention_out_bias, layer),
          of_layer(p, first.mlp_up_bias, layer),
          of_layer(p, first.mlp_down_bias, layer),
          of_layer(p, first.mlp_gate, layer),
          of_layer(p, first.query_norm_weight, layer),
          of_layer(p, first.key_norm_weight, layer)};
}

}  // namespace clusterfusion::cuda
