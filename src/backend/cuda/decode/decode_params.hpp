// Everything the streaming decode kernel is told: plain data, filled by the host.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "clusterfusion/model.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

// A MatrixPlan, with what every lane would otherwise compute again.
struct StreamedMatrix {
  std::int32_t rows;
  std::int32_t rows_per_chunk;
  std::int32_t chunks;
  std::int32_t unit_rows;
  std::int32_t units_per_chunk;
  std::int32_t segments;
  std::int32_t segments_log2;
  std::int32_t slices_log2;
  std::int32_t slice_columns;
  std::int32_t segment_columns;
  std::int32_t row_bytes;
  std::int32_t iterations;
};

// One layer on the device. Matrices and norm parameters in the weights' 16-bit type, biases float32
// (zeros where the checkpoint has none).
struct StreamedLayer {
  const char* qkv;
  const char* attention_out;
  const char* mlp_up;
  const char* mlp_down;
  const void* input_norm_weight;
  const void* input_norm_bias;
  const void* post_norm_weight;
  const void* post_norm_bias;
  const float* qkv_bias;
  const float* attention_out_bias;
  const float* mlp_up_bias;
  const float* mlp_down_bias;
};

// The best token that one SM has seen, with its score (logit, scaled and with noise if sampled).
struct Candidate {
  float score;
  std::int32_t token;
};

// Scratch in device memory, written and read within a launch.
struct DecodeScratch {
  float* qkv;              // [3 hidden], with bias, before the rotation
  void* attention;         // [hidden], 16-bit
  void* mlp;               // [intermediate], 16-bit
  float* delta_attention;  // [hidden], with bias
  float* delta_mlp;        // [hidden], with bias
  float* split_state;      // [heads, splits, 2]: maximum (base 2) and sum
  float* split_output;     // [heads, splits, head_dim], not normalised
  Candidate* candidates;   // [2, SMs]
  // Counters; all zero when a launch begins.
  std::uint32_t* tickets;   // [phases of a step]
  std::uint32_t* arrivals;  // grid barrier
  std::uint32_t* heads_done;
  std::uint32_t* splits_done;  // [heads]
};

struct DecodeParams {
  StreamedMatrix qkv, attention_out, mlp_up, mlp_down, lm_head;
  const StreamedLayer* layers;
  const void* embedding;
  const char* lm_head_weight;
  const void* final_norm_weight;
  const void* final_norm_bias;
  const float2* rotary;  // [positions, rotary_dim / 2]: cosine and sine
  std::int32_t num_layers, hidden_size, intermediate_size, num_heads, head_dim, rotary_dim;
  std::int32_t vocab_size;
  float layer_norm_eps;
  Activation activation;
  bool parallel_residual;

  std::int32_t stages, stage_bytes, sum_slots, max_in_flight;

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

  DecodeScratch scratch;
};

// Phases of one step, each with a ticket counter: those of the layers, and the LM head.
constexpr std::int64_t num_phases(std::int64_t num_layers, bool parallel_residual) {
  return num_layers * (parallel_residual ? 2 : 4) + 1;
}

}  // namespace clusterfusion::cuda
