// The parameters of the streaming kernel for many rows: plain data, filled by the host.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "backend/cuda/decode/decode_params.hpp"
#include "plan/row_groups.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

// Warps that add up the consumers' partial sums and run the epilogue.
inline constexpr int kReducerWarps = 4;
inline constexpr int kStreamBlockThreads = (plan::kConsumerWarps + 4 + kReducerWarps) * 32;

// A ProductCut, with what the device would otherwise compute again.
struct StreamedProduct {
  std::int32_t rows, parts;
  std::int32_t chunks;  // of one part
  std::int32_t pieces, iterations, piece_steps;
  std::int32_t piece_bytes, part_bytes, row_bytes;  // in memory
  std::int32_t row_pitch;                           // in a stage
};

// One token of one sequence at one position.
struct StreamedRow {
  std::int32_t position;             // of the first step
  std::int32_t token;                // the first step's input
  float temperature;                 // 0: greedy
  std::int32_t drawable_vocab_size;  // tokens from here on are not chosen
  std::uint64_t seed;
  char* const* kv_pages;  // of its sequence: the page of each 64 positions
};

// How results cross between SMs within one epoch (a layer or the LM head of one step) about `rows`
// rows: Lamport buffers (sync/lamport_buffer.cuh) at these byte offsets of a set. Epoch e uses
// set e % kLamportSets.
struct RowsLayout {
  std::int32_t input_rows;  // of an input's buffer: `rows` and what is lacking to a multiple of 8
  // Inputs of products, 16-bit [hidden / 32, input_rows, 32]; not used if one row stays in place.
  std::int32_t input_norm, post_norm;
  std::int32_t qkv;        // float32 [rows, 3 hidden], with bias, before the rotation
  std::int32_t mlp;        // 16-bit [intermediate / 32, input_rows, 32]
  std::int32_t attention;  // 16-bit [hidden / 32, input_rows, 32]
  // float32 [parts, rows, hidden]: what is to be added to the residual stream, biases included;
  // first the parts of the second MLP matrix, then attention's.
  std::int32_t residual;
  // float32 [rows, heads, max_splits, 2 + head_dim]: maximum (base 2), sum, output not normalised.
  std::int32_t partials;
  std::int32_t candidates;  // Candidate [rows, SMs, kReducerWarps]
  std::int32_t bytes;       // of a set, a multiple of 16
};

struct StreamParams {
  StreamedProduct qkv, mlp_up, mlp_down, attention_out, lm_head;
  // Layer i's pointers are those of the first layer plus i strides.
  StreamedLayer first_layer;
  std::int64_t layer_stride;
  const void* embedding;
  const float* first_steering;  // of all rows: as in DecodeParams
  AblationBits ablated;
  const char* lm_head_weight;
  const void* final_norm_weight;
  const void* final_norm_bias;
  const float2* rotary;  // [positions, rotary_dim / 2]: cosine and sine
  bool reads_once;       // the weights that it streams are more than L2 holds
  std::int32_t num_layers, hidden_size, intermediate_size, num_heads, head_dim, rotary_dim;
  std::int32_t vocab_size;
  float layer_norm_eps;
  float inverse_hidden_size;
  Activation activation;
  bool parallel_residual;
  bool folds_parts;  // of the second MLP matrix: one SM has all parts of a row

  std::int32_t stages, stage_bytes, scratch_bytes;
  std::int32_t bias_offset;      // in a stage, of the biases
  std::int32_t max_in_flight;    // copies under way for each SM
  std::int32_t announced_ahead;  // stages of the ring, beside those with copies in flight
  // Copies that may be in flight once so many percent of a long phase's chunks are assigned.
  std::int32_t late_in_flight, late_percent;
  // Of a phase's chunks that are assigned round-robin, then by ticket; and of a long phase's.
  std::int32_t static_percent, long_static_percent;
  std::int32_t ticket_bytes;  // of weights that one ticket stands for, about, of a long phase

  // Of attention: a task, how many queries it has at most, where the first one lies in scratch, and
  // how many there is room for.
  plan::TaskLayout task_layout;
  std::int32_t task_queries;
  std::int32_t tasks_offset, task_slots;
  bool keeps_tasks, keeps_inputs;  // nothing else is where they, or their inputs, lie
  std::int32_t kv_head_bytes, kv_block_bytes, kv_block_positions, max_splits;

  std::int32_t rows, groups, steps;
  std::int32_t rows_reciprocal;  // 65536 / rows + 1: n * this >> 16 is n / rows for n below 256
  const StreamedRow* row_table;  // [rows]
  const plan::RowGroup* group_table;  // [groups], in order of rows

  // float32 [rows, logits_stride] of the last step, or null; a multiple of 4, so that each row
  // begins at a multiple of 16 bytes.
  float* logits;
  std::int32_t logits_stride;
  std::int32_t* chosen;  // [steps, rows]: -1 where a logit was not finite

  float2* residual;  // float32 [SMs, hidden]: the residual stream of the row that each SM holds
  char* lamport;     // kLamportSets sets, all bits one when a launch begins
  RowsLayout layout;
  // Counters; all zero when a launch begins.
  std::uint32_t* tickets;   // [steps, phases of a step, plan::kMaxResidualParts]
  std::uint32_t* arrivals;  // of blocks at epochs

  std::uint64_t* timeline;  // [SMs, epochs, StreamPoint::count] nanoseconds, or null
};

// Points of an epoch at which thread 0 of each SM notes the time, if asked to.
enum class StreamPoint : int {
  begin,
  residual,      // pending updates are added, where this SM owns a row
  normalised,    // and published
  first_input,   // this SM has the first product's input
  first_phase,   // and has multiplied its share of the first phase
  attention,     // its share of attention is done
  second_input,  // it has the first input of the second phase
  second_phase,  // and has multiplied its share
  count
};

constexpr std::int64_t stream_tickets(std::int64_t num_layers, bool parallel_residual) {
  return num_phases(num_layers, parallel_residual) * plan::kMaxResidualParts;
}

}  // namespace clusterfusion::cuda
