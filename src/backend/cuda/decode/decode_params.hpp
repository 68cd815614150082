// The parameters of the streaming decode kernel: plain data, filled by the host.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "backend/cuda/interventions/ablation_bits.hpp"
#include "clusterfusion/model.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

// Steps of one launch, at most.
inline constexpr std::int32_t kStepsOfLaunch = 16;
// Chunks whose sums one SM may collect before it finishes their rows.
inline constexpr std::int32_t kMaxChunkSlots = 240;

// A MatrixPlan, with what every lane would otherwise compute again.
struct StreamedMatrix {
  std::int32_t rows;
  std::int32_t rows_per_chunk;
  std::int32_t chunks;
  std::int32_t unit_rows;
  std::int32_t units_per_chunk;
  std::int32_t sums_per_chunk;
  std::int32_t segments;
  std::int32_t segments_log2;
  std::int32_t slices_log2;
  // Lanes that add up a row, and how many of its sums each of them has.
  std::int32_t row_lanes_log2, lane_sums_log2;
  std::int32_t slice_columns;
  std::int32_t segment_columns;
  std::int32_t row_bytes;
  std::int32_t first_stage_bytes;  // of a row in two stages, else 0
  std::int32_t iterations;
  bool swaps;  // each two iterations in odd slices: see swap_columns
  plan::MmaMapping mapping;
  std::int32_t max_slots;         // chunks whose sums fit
  std::uint32_t rows_reciprocal;  // 2^32 / rows_per_chunk, rounded up

  // The chunk, of some that follow each other, that row `row` of them lies in: row /
  // rows_per_chunk without a division. Exact for rows below 2^16.
  constexpr std::int32_t slot_of(std::int32_t row) const {
    return rows_per_chunk == 1 ? row
                               : static_cast<std::int32_t>(
                                     (static_cast<std::uint64_t>(row) * rows_reciprocal) >> 32);
  }
};

// One layer on the device. Matrices and norm parameters in the weights' 16-bit type, biases in
// elements of DecodeParams::bias_element_bytes, at addresses that are multiples of 16; null if
// there are none.
struct StreamedLayer {
  const char* qkv;
  const char* attention_out;
  const char* mlp_up;
  const char* mlp_down;
  const void* input_norm_weight;
  const void* input_norm_bias;
  const void* post_norm_weight;
  const void* post_norm_bias;
  const char* qkv_bias;
  const char* attention_out_bias;
  const char* mlp_up_bias;
  const char* mlp_down_bias;
  const char* mlp_gate;  // of a gated MLP
  const void* query_norm_weight;
  const void* key_norm_weight;
};

// pointer_to(LayerTensor) gives the address of each tensor, null if the layer has none.
template <typename PointerTo>
StreamedLayer streamed_layer(const PointerTo& pointer_to) {
  return {.qkv = pointer_to(LayerTensor::qkv_weight),
          .attention_out = pointer_to(LayerTensor::attention_out_weight),
          .mlp_up = pointer_to(LayerTensor::mlp_up_weight),
          .mlp_down = pointer_to(LayerTensor::mlp_down_weight),
          .input_norm_weight = pointer_to(LayerTensor::input_norm_weight),
          .input_norm_bias = pointer_to(LayerTensor::input_norm_bias),
          .post_norm_weight = pointer_to(LayerTensor::post_norm_weight),
          .post_norm_bias = pointer_to(LayerTensor::post_norm_bias),
          .qkv_bias = pointer_to(LayerTensor::qkv_bias),
          .attention_out_bias = pointer_to(LayerTensor::attention_out_bias),
          .mlp_up_bias = pointer_to(LayerTensor::mlp_up_bias),
          .mlp_down_bias = pointer_to(LayerTensor::mlp_down_bias),
          .mlp_gate = pointer_to(LayerTensor::mlp_gate_weight),
          .query_norm_weight = pointer_to(LayerTensor::query_norm_weight),
          .key_norm_weight = pointer_to(LayerTensor::key_norm_weight)};
}

// The best token that one SM has seen, with its score: the logit, or noisy_score() if sampled.
struct alignas(16) Candidate {
  double score;
  std::int64_t token;  // of 32 bits: never "not ready" as an element of a Lamport buffer
};

// How results cross between SMs within one epoch, a layer or the LM head of one step: Lamport
// buffers (sync/lamport_buffer.cuh), at these byte offsets of a set. Epoch e uses set e %
// kLamportSets.
struct LamportLayout {
  std::int32_t qkv;              // float32 [qkv_size], with bias, before the rotation
  std::int32_t mlp;              // 16-bit [intermediate], in operand_order
  std::int32_t attention;        // 16-bit [heads * head_dim], in operand_order
  std::int32_t delta_attention;  // float32 [hidden], with bias
  std::int32_t delta_mlp;        // float32 [hidden], with bias
  // float32 [KV heads, splits, heads of a group, 2 + head_dim]: maximum (base 2), sum, output not
  // normalised.
  std::int32_t partials;
  std::int32_t candidates;  // Candidate [SMs]
  std::int32_t bytes;       // of a set, a multiple of 16
};
inline constexpr std::int32_t kLamportSets = 3;

// Points of an epoch at which thread 0 of each SM notes the time, if asked to.
enum class TimelinePoint : int {
  begin,
  input,          // what the epoch before has left is there
  normalised,     // and normalised
  qkv,            // this SM's QKV rows (of the LM head's epoch: its logits) are written
  mlp_up,         // its MLP-up rows
  attention,      // its share of attention
  mlp,            // all MLP activations are there
  mlp_down,       // its MLP-down rows are written
  attention_in,   // all of attention is there
  attention_out,  // its attention output rows are written
  count
};

struct DecodeParams {
  StreamedMatrix qkv, attention_out, mlp_up, mlp_down, lm_head;
  // Layer i's pointers are those of the first layer plus i strides: known without a load.
  StreamedLayer first_layer;
  std::int64_t layer_stride;
  const void* embedding;
  const float* first_steering;  // [hidden]: added to the residual stream before layer 0; or null
  AblationBits ablated;
  const char* lm_head_weight;
  const void* final_norm_weight;
  const void* final_norm_bias;
  const float2* rotary;  // [positions, rotary_dim / 2]: cosine and sine
  bool reads_once;       // the weights that it streams are more than L2 holds
  std::int32_t num_layers, hidden_size, intermediate_size, num_heads, head_dim, rotary_dim;
  std::int32_t num_kv_heads, head_group;  // heads that share one of keys and values
  std::int32_t vocab_size;
  std::int32_t drawable_vocab_size;  // tokens from here on are not chosen
  float layer_norm_eps;
  float inverse_hidden_size;
  Activation activation;
  bool parallel_residual;
  bool rms_norm;

  std::int32_t stages, stage_bytes, input_bytes, sum_slots, max_in_flight;
  std::int32_t announced_ahead;  // stages of the ring, beside those with copies in flight
  std::int32_t bias_offset;      // in a stage, of the biases
  std::int32_t
      bias_element_bytes;  // 4: float32 (the engine's), 2: the weights' type (the callers')
  std::int32_t
      static_percent;  // of a phase's chunks that are assigned round-robin; the rest by ticket
  std::int32_t long_static_percent;  // the same of a long phase in layers of any kind
  // Copies that may be in flight once so many percent of a long phase's chunks are assigned.
  std::int32_t late_in_flight, late_percent;
  // Copies that may be in flight while the SM multiplies, in layers of any kind; 0: no others.
  std::int32_t busy_in_flight;
  std::uint32_t ticket_chunks;  // that one ticket stands for

  char* const* kv_pages;  // of this sequence: the page of each 64 positions
  std::int32_t kv_head_bytes, kv_block_bytes, kv_block_positions;

  std::int32_t first_position;  // of the first step's input
  std::int32_t steps;
  const std::int32_t* given_tokens;  // inputs of the first `given_count` steps; later steps take
  std::int32_t given_count;          // the token that the step before has chosen
  std::int32_t first_scored_step;    // steps before it skip the LM head

  float* logits;         // [steps - first_scored_step, vocab], or null
  std::int32_t* chosen;  // [steps]: -1 where a logit was NaN or the step is not scored
  float temperature;     // 0: greedy
  std::uint64_t seed;

  char* lamport;  // kLamportSets sets, all bits one when a launch begins
  LamportLayout layout;
  // Counters; all zero when a launch begins.
  std::uint32_t* tickets;   // [steps, phases of a step]
  std::uint32_t* arrivals;  // of blocks at epochs

  std::uint64_t* timeline;  // [SMs, epochs, TimelinePoint::count] nanoseconds, or null
};

// Phases of one step, each with a ticket counter: those of the layers, and the LM head.
constexpr std::int64_t num_phases(std::int64_t num_layers, bool parallel_residual) {
  return num_layers * plan::layer_phases(parallel_residual) + 1;
}

}  // namespace clusterfusion::cuda
