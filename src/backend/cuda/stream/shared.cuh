// What the roles of the streaming kernel share: shared memory, the ids of what streams, and where
// things lie.
#pragma once

#include "backend/cuda/decode/epoch.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ptx/elect.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/stream/attention_task.cuh"
#include "backend/cuda/stream/stream_params.hpp"
#include "backend/cuda/sync/counter.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"
#include "backend/cuda/sync/ring.cuh"

namespace clusterfusion::cuda::stream {

using namespace device;
using plan::Stream;

inline constexpr int kMaxOperands = plan::kMaxResidualParts;

// One input vector of a phase, and what it is multiplied by.
struct Operand {
  // For the scheduler, of the first layer.
  const char* weights;        // where the part's columns begin
  const char* biases;         // float32, or null: none, or another part adds them
  std::int32_t chunk_stride;  // bytes from chunk to chunk in memory
  std::int32_t bias_stride;   // and of the biases
  std::int32_t stage_copy_bytes, last_copy_bytes;  // of a piece, and of one of the last chunk
  std::int32_t source;  // of the vector: bytes from the beginning of a Lamport set
  std::int32_t output;  // of the result
  Stream stream;
  std::int32_t chunks;
  std::int32_t rows;  // of the matrix
  std::int32_t pieces, iterations, piece_steps;
  // What the producer must know of the rows of a piece.
  struct alignas(16) Copy {
    std::int32_t bytes;      // of one row
    std::int32_t row_bytes;  // from row to row in memory
    std::int32_t row_pitch;  // and in the stage
  } copy;
  std::int32_t parts;  // of the product, an operand each unless they are folded
  // Input vectors, side by side in the activations, of which row n of a chunk is multiplied by
  // vector n % slots: the parts of one row of the matrix, which the reducers add up. 1, 2 or 4.
  // Where operands take turns, several have the same first slot.
  std::int32_t first_slot, slots;
  std::int32_t source_part_bytes;  // from one part's columns to the next one's
};

struct StreamPhase {
  int operands;
  int slots;           // input vectors of all operands
  bool fits;           // side by side into registers; else operands take turns
  int second_product;  // its first operand
  int chunks;          // of all operands
  int static_percent;  // of the chunks that are assigned round-robin
  int first_dynamic;   // first chunk that is drawn by ticket, unless the phase rotates
  int late_from;       // from this chunk on p.late_in_flight copies may be under way
  int ticket_chunks;
  bool normalizes, attention_before;
  bool rotates;  // each block begins with another operand, as not all fit into registers
};

struct StreamShared {
  RingControl ring;
  // Partial sums between consumers and reducers.
  std::uint64_t partial_full[plan::kPartialBuffers], partial_empty[plan::kPartialBuffers];
  int2 partial_what[plan::kPartialBuffers];  // id, chunk
  float2 reduce[2][plan::kConsumerWarps];
  Candidate candidate[plan::kConsumerWarps];
  Candidate best[kReducerWarps][32];  // of the rows, as the reducers see them
  StreamPhase phases[kMaxPhases];
  Operand operands[kMaxPhases][kMaxOperands];
  StreamedRow rows[plan::kMaxRows];
  plan::RowGroup groups[plan::kMaxRows];
  // Of the scheduler alone: this step's tasks of each group.
  plan::AttentionSplits splits[plan::kMaxRows];
  int task_of_group[plan::kMaxRows];
  int cached[plan::kMaxRows];  // positions before those of the step
  // Of the consumers, which are behind the scheduler: this step's tasks of this block.
  AttentionTask tasks[plan::kMaxRows];
  int num_tasks;
  uint4 zeros;
  int token;
  // Epochs that the consumers have begun: what they wrote and read in earlier ones is done.
  std::uint32_t begun;
  // Epochs e that all blocks have begun, as this block knows: the Lamport set of epoch e + 1 is
  // clear and may be used, and KV entries of the epochs before e may be streamed.
  std::uint32_t cleared;
};
static_assert(sizeof(StreamShared) <= plan::kStreamControlBytes);

__device__ __forceinline__ StreamShared* shared_control(char* shared) {
  return reinterpret_cast<StreamShared*>(shared);
}
// What reducers' partial sums, the normalised input and attention use in turn.
__device__ __forceinline__ char* shared_scratch(char* shared) {
  return shared + plan::kStreamControlBytes;
}
__device__ __forceinline__ char* shared_ring(const StreamParams& p, char* shared) {
  return shared + plan::kStreamControlBytes + p.scratch_bytes;
}

// A Lamport buffer of an epoch.
template <typename Element>
__device__ __forceinline__ Element* lamport_of(const StreamParams& p, int epoch,
                                               std::int32_t offset) {
  return reinterpret_cast<Element*>(lamport_set(p, epoch) + offset);
}

// Where element `index` of row `row` of a product's input lies in its Lamport buffer, in elements:
// a step's columns of all rows side by side, so that what a warp loads together are whole lines.
// (Half lines, row by row, took twice as long.)
__device__ __forceinline__ int input_place(const StreamParams& p, int row, int index) {
  constexpr int kColumns = plan::kStepColumns;
  const int place = operand_order(index);
  return place / kColumns * (kColumns * p.layout.input_rows) + row * kColumns + place % kColumns;
}

// The id of a ring stage: which epoch and phase it belongs to, and which operand.
inline constexpr int kAttentionPhase = 7;
__device__ __forceinline__ int phase_id(int epoch, int phase) { return epoch * 8 + phase; }
__device__ __forceinline__ int ring_id(int phase_id, int operand) { return phase_id * 8 + operand; }
__device__ __forceinline__ int phase_id_of(int ring_id) { return ring_id >> 3; }
__device__ __forceinline__ int operand_of(int ring_id) { return ring_id & 7; }
__device__ __forceinline__ int epoch_of(int ring_id) { return ring_id >> 6; }
__device__ __forceinline__ int phase_of(int ring_id) { return ring_id >> 3 & 7; }

// Ids of partial sums that are none.
inline constexpr int kEndOfHead = -2;  // the LM head is over: publish the candidates

// One row stays in every block; several have an owner each.
__device__ __forceinline__ bool keeps_residual_everywhere(const StreamParams& p) {
  return p.rows == 1;
}
// What the second MLP matrix adds to the residual stream comes in so many vectors.
__device__ __forceinline__ int mlp_vectors(const StreamParams& p) {
  return p.folds_parts ? 1 : p.mlp_down.parts;
}
// The row whose residual stream this block holds, or -1. The last blocks have the least attention.
__device__ __forceinline__ int owned_row(const StreamParams& p) {
  if (keeps_residual_everywhere(p)) return 0;
  const int row = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  return row < p.rows ? row : -1;
}

// Where block `block` of a head's keys and values lies, as the engine keeps them in pages.
__device__ __forceinline__ char* kv_block(const StreamParams& p, char* const* pages, int layer,
                                          int head, int block) {
  const int first = block * p.kv_block_positions;
  const int block_in_page = first % plan::kKvPagePositions / p.kv_block_positions;
  return pages[first / plan::kKvPagePositions] +
         static_cast<std::int64_t>(layer * p.num_heads + head) * p.kv_head_bytes +
         static_cast<std::int64_t>(block_in_page) * p.kv_block_bytes;
}

}  // namespace clusterfusion::cuda::stream
