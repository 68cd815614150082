// How a decode step of 1 to 16 rows streams through one SM's ring, as data: how each matrix is cut
// for the tensor cores, what a stage of the ring holds, and what must fit where. A row is one token
// of one sequence at one position. Plain C++: no CUDA here, so every promise is tested on any
// machine.
//
// Terms
//   part     a share of a matrix's columns, summed by itself; the results of parts are added in
//            order. Several SMs can work on a wide row of the matrix that way.
//   chunk    8 consecutive rows of the matrix, of one part: operand B of m16n8k16. Drawn from the
//            scheduler as one.
//   piece    a chunk's share of one ring stage: 8 rows x piece_columns, each row one bulk copy
//   step     32 consecutive columns: 16 bytes of each lane, two products
//
// A piece's steps are shared out among the consumer warps in consecutive runs of `iterations`. The
// sums of the warps are added in order of the warps. So a row's arithmetic does not depend on how
// many rows are computed beside it, nor on which SM computes what.
#pragma once

#include <cstdint>

#include "base/round_up.hpp"
#include "clusterfusion/model.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {

// Rows of a matrix in a chunk.
inline constexpr std::int32_t kChunkRows = 8;
// Columns of a step.
inline constexpr std::int32_t kStepColumns = 32;
// Steps of a piece that one warp multiplies, at most.
inline constexpr std::int32_t kMaxPieceIterations = 5;
// Rows that one launch can take: of more, the activations do not fit into registers.
inline constexpr std::int32_t kMaxRows = 16;
// Parts of all matrices whose results are added to the residual stream together, at most.
inline constexpr std::int32_t kMaxResidualParts = 5;
// Queries that attention's products take together.
inline constexpr std::int32_t kQuadQueries = 4;
// Queries of one attention task, at most, in a kernel for heads of this size with so many rows of
// activations: rows of one sequence that share what has landed. More have no room in the registers.
constexpr std::int32_t max_task_queries(std::int64_t head_dim,
                                        std::int32_t operand_rows = kMaxRows) {
  const std::int32_t queries = head_dim <= 80    ? 4 * kQuadQueries
                               : head_dim <= 128 ? 2 * kQuadQueries
                                                 : kQuadQueries;
  return queries < operand_rows ? queries : operand_rows;
}
// Rows of one sequence in a step, at most.
inline constexpr std::int32_t kMaxSequenceRows = 16;
// Shared memory for barriers, labels, tables and small reductions.
inline constexpr std::int64_t kStreamControlBytes = 8064;
// Buffers through which the reducers get the consumer warps' sums of a chunk.
inline constexpr std::int32_t kPartialBuffers = 4;

// How a row-major [rows, columns] matrix of 2-byte elements is streamed.
struct ProductCut {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int32_t parts = 0;
  std::int32_t pieces = 0;      // of a part's chunk
  std::int32_t iterations = 0;  // steps of a piece that one warp multiplies; the last warps fewer
  std::int32_t chunks = 0;      // of one part; the last may hold fewer rows

  std::int64_t part_columns() const noexcept { return columns / parts; }
  std::int64_t piece_columns() const noexcept { return part_columns() / pieces; }
  std::int32_t piece_steps() const noexcept {
    return static_cast<std::int32_t>(piece_columns() / kStepColumns);
  }
  // From one row of a piece to the next in shared memory: two rows are 64 bytes apart modulo 128,
  // so that the eight lanes that load together hit different banks.
  std::int64_t row_pitch() const noexcept {
    const std::int64_t bytes = piece_columns() * 2;
    return bytes % 128 == 0 ? bytes + 64 : bytes;
  }
  std::int64_t stage_bytes() const noexcept { return kChunkRows * row_pitch(); }
};

// A model's matrices. All kernels that compute many rows cut them alike, so that a row has the same
// bits whichever computes it.
struct ProductCuts {
  ProductCut qkv, attention_out, mlp_up, mlp_down, lm_head;
};

struct StreamPlan : ProductCuts {
  KvPlan kv;
  std::int32_t pieces = 0;  // of any matrix, at most: 2 or 4
  // A ring stage: a piece or KV block, and behind it the biases of the chunk's rows. Multiples of
  // 128.
  std::int64_t data_bytes = 0;
  std::int64_t stage_bytes = 0;
};

// Tasks of attention that an SM computes as one batch, at most.
inline constexpr std::int32_t kMaxTaskSlots = 4;

// What a task of attention has in shared memory, as byte offsets: first the states of the shares of
// its positions, then its inputs: its queries, and keys and values of its sequence that are not in
// the cache yet.
struct TaskLayout {
  std::int32_t queries = 0;
  std::int32_t fresh = 0;
  std::int32_t bytes = 0;
};
// Of a step's tasks: queries, and rows of one sequence, at most; the positions that those of one
// head attend to, in all; and how many tasks an SM has, at most.
struct TaskExtent {
  std::int32_t queries = 1;
  std::int32_t sequence_rows = 1;
  std::int64_t positions = 0;
  std::int32_t tasks = kMaxTaskSlots;
};
constexpr TaskLayout task_layout(std::int64_t head_dim, const TaskExtent& extent) {
  // Queries, and what rounding took from them; keys and values: 16-bit.
  const auto vectors = static_cast<std::int32_t>(2 * head_dim * 2);
  // Maximum, sum and output of every share: float32.
  const auto states = static_cast<std::int32_t>(kConsumerWarps * (head_dim + 2) * 4);
  // Of more than one quad, two quads lie together, as operands of products.
  const auto held = static_cast<std::int32_t>(
      round_up(extent.queries, extent.queries > kQuadQueries ? 2 * kQuadQueries : 1));
  TaskLayout memory;
  memory.queries = extent.queries * states;
  memory.fresh = memory.queries + held * vectors;
  memory.bytes = memory.fresh + extent.sequence_rows * vectors;
  return memory;
}

// The shared memory of a block that computes so many rows.
struct StreamMemory {
  // What the reducers' partial sums, the normalised input and attention use in turn.
  std::int64_t scratch_bytes = 0;
  TaskLayout task;
  std::int32_t task_slots = 1;
  // Where the tasks begin in scratch; whether nothing else is there, and nothing else where their
  // inputs are.
  std::int64_t tasks_offset = 0;
  bool keeps_tasks = false, keeps_inputs = false;
  std::int32_t stages = 0;
  std::int64_t shared_bytes = 0;  // of the whole block
};

// Errors: unsupported if the layer has what unbatched_because() names, a number of columns is no
// multiple of kStepColumns, or the MLP is too wide (names it).
ProductCuts cut_products(const ModelConfig& config);

// `kv` is how the cache is laid out; it is the same for every kernel of a backend.
// Errors: unsupported if the model's shape cannot be streamed (names the number that does not fit)
// or the device's shared memory is too small for the ring.
StreamPlan make_stream_plan(const ModelConfig& config, const KvPlan& kv,
                            const DeviceLimits& limits);

// As many tasks are a batch as cost no stage of the ring; they have a place of their own if that
// costs none either.
// Errors: unsupported if the device's shared memory is too small for the ring.
StreamMemory stream_memory(const StreamPlan& plan, const ModelConfig& config,
                           const DeviceLimits& limits, std::int32_t rows, const TaskExtent& extent);

// Rows of the activations that a kernel for `rows` rows holds: 8 or 16. More of them than rows hold
// several input vectors at once: of one row all that a phase needs.
constexpr std::int32_t operand_rows(std::int32_t rows) { return rows <= 8 ? 8 : 16; }

}  // namespace clusterfusion::plan
