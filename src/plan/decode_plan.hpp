// What one streaming decode step does, as data: how each matrix is cut into chunks for the ring,
// how a chunk is cut into units for the consumer warps, how the context is cut into attention
// splits, and what must fit where. Plain C++: no CUDA here, so every promise is tested on any
// machine.
//
// Terms
//   chunk    whole consecutive rows of a matrix, contiguous in memory: one bulk copy, one stage of
//            the ring. In layers of any kind a chunk of one wide row comes in two stages.
//   unit     what one warp multiplies at a time: `unit_rows` rows x one segment of their columns,
//            which is cut into `slices` equal slices. Lane (g, q) covers 8 consecutive elements at
//              row g / slices, column segment + (g % slices) slice_columns + 32 i + 8 q
//            for i = 0 .. iterations - 1: 16-byte loads, in the checkpoint's own layout. They are
//            operand A of a tensor-core product as they stand: words 0 and 2 of each lane's 16
//            bytes in row g, words 1 and 3 in row g + 8.
//            In layers of any kind the last slices of a row may have fewer elements, or none.
//            Of a row in two stages each has half of the slices: of lanes with g < 4, and g >= 4.
//   segment  is fixed for each warp (warp % segments), so a warp's activations stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "clusterfusion/model.hpp"
#include "plan/kv_page.hpp"

namespace clusterfusion::plan {

inline constexpr std::int32_t kConsumerWarps = 8;
inline constexpr std::int32_t kConsumerThreads = kConsumerWarps * 32;
// Stages of a ring, at most.
inline constexpr std::int32_t kMaxStages = 16;
// Shared memory for barriers, labels and small reductions.
inline constexpr std::int64_t kControlBytes = 3328;

// What a kernel must know of its device.
struct DeviceLimits {
  std::int32_t sm_count = 0;
  std::int64_t shared_bytes_per_block = 0;  // the opt-in maximum
};

// How a chunk's units and the activations are mapped to mma.m16n8k16: what the 8 columns of operand
// B, the activations, are. Each row of A needs one of them.
enum class MmaMapping : std::int32_t {
  // One half of the activations (words 0 and 2, or 1 and 3) of unit_rows x slices = 8 slices: it
  // takes two products, and of each one half of the rows is used.
  two_pass,
  // Both halves of 2 or 4 slices, for 4 or 2 rows: one product is enough. With 2 slices half of the
  // columns is zero, which takes less power.
  packed,
  // Both halves of 4 slices for two rows, which are those of two chunks of one row each: lanes of
  // g < 4 have the first one's.
  packed_pairs,
};

// How a row-major [rows, columns] matrix of 2-byte elements is streamed.
struct MatrixPlan {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int32_t rows_per_chunk = 0;
  std::int32_t chunks = 0;      // the last may hold fewer rows
  std::int32_t unit_rows = 0;   // 1, 2, 4 or 8
  std::int32_t segments = 0;    // of a row: 1, 2, 4 or 8
  std::int32_t iterations = 0;  // 16-byte loads of a lane for one unit
  std::int32_t stages = 1;      // of a chunk; 2 only of one row in eight segments
  MmaMapping mapping = MmaMapping::two_pass;

  std::int32_t slices() const noexcept {
    return mapping == MmaMapping::packed_pairs ? 4 : 8 / unit_rows;
  }
  std::int64_t slice_columns() const noexcept { return std::int64_t{iterations} * 32; }
  // Of a segment in one stage.
  std::int64_t segment_columns() const noexcept { return slice_columns() * slices() / stages; }
  // Slices go beyond the columns: the last ones are shorter or empty.
  bool is_ragged() const noexcept { return segment_columns() * segments * stages != columns; }
  // Columns that a chunk's first stage has; a second one has the rest.
  std::int64_t first_stage_columns() const noexcept {
    return stages == 1 ? columns : segment_columns() * segments;
  }
  // In a row, the first column of what lane (g, q) covers of a segment.
  std::int64_t lane_column(std::int32_t segment, std::int32_t g, std::int32_t q) const noexcept {
    const std::int32_t slice = g % slices(), in_stage = slices() / stages;
    return slice / in_stage * first_stage_columns() + segment * segment_columns() +
           slice % in_stage * slice_columns() + 8 * q;
  }
  std::int64_t row_bytes() const noexcept { return columns * 2; }
  std::int64_t chunk_bytes() const noexcept { return rows_per_chunk * row_bytes(); }
  // What one stage has to hold.
  std::int64_t stage_bytes() const noexcept { return rows_per_chunk * first_stage_columns() * 2; }
  // Units of one segment in a chunk; the kConsumerWarps / segments warps of a segment share them.
  std::int32_t units_per_chunk() const noexcept { return rows_per_chunk / unit_rows; }
  // Partial sums that a chunk leaves behind: one for each row, segment and slice.
  std::int32_t sums_per_chunk() const noexcept { return rows_per_chunk * segments * slices(); }
};

// Positions of a block of the KV cache that one warp attends to at once; no block has fewer.
inline constexpr std::int32_t kMinKvBlockPositions = 16;

// How one (layer, head) of the KV cache is streamed. A page holds, for each layer and head, blocks
// of `block_positions` keys followed by as many values: [blocks][2][block_positions][head_dim].
struct KvPlan {
  std::int32_t block_positions = 0;  // 16, 32 or 64: the most that fit into a ring stage
  std::int64_t block_bytes = 0;
  std::int64_t head_bytes = 0;   // one page, one layer, one head
  std::int64_t page_bytes = 0;   // one page, all layers and heads
  DType dtype = DType::float16;  // of keys and values
};

// Heads that share a head of keys and values, at most: each has a column of a tensor-core product.
inline constexpr std::int32_t kMaxHeadGroup = 8;

// What a layer has that the kernels of many rows (stream/, gemm/) do not compute, whatever its
// sizes: "grouped heads". Empty if there is nothing.
std::string unbatched_because(const LayerSpec& spec);

// What a layer has that the streaming kernel for one row does not compute, whatever its sizes:
// "groups of more than 8 heads". Empty if there is nothing. Such models are decoded layer by layer.
std::string unstreamed_because(const LayerSpec& spec);

// The two kinds of layers that the streaming kernel for one row has code for: `plain` ones, of
// which unbatched_because() says nothing (GPT-NeoX's), and `any`.
enum class LayerKind : std::int32_t { plain, any };
LayerKind layer_kind(const LayerSpec& spec);

// Rows of the first matrix of the MLP as it streams. Of a gated one a chunk is rows of the gate's
// matrix, and behind them as many, of the same numbers, of the other.
constexpr std::int64_t mlp_up_rows(const LayerSpec& spec) noexcept {
  return spec.gated_mlp ? 2 * spec.intermediate_size : spec.intermediate_size;
}

// Normalised inputs of a layer that are in shared memory together. With a sequential residual one
// is enough, but the code for plain layers has places for two.
inline std::int64_t normed_inputs(const LayerSpec& spec) {
  return layer_kind(spec) == LayerKind::any && !spec.parallel_residual ? 1 : 2;
}

// Dimensions of a head that the warps of attention merge together, in layers of any kind.
inline constexpr std::int32_t kMergedDims = 64;

// Floats that attention to one head of keys and values needs in shared memory: the warps' states
// of each query head, behind them queries, key and value as they come, and these as they enter the
// products (16-bit, the queries twice), and zeros. In layers of any kind they lie over the
// normalised inputs, which have been read by then.
inline std::int64_t attention_floats(const LayerSpec& spec) {
  const std::int64_t group = spec.num_heads / spec.kv_heads();
  const bool in_parts = layer_kind(spec) == LayerKind::any;
  const std::int64_t merged =
      in_parts ? std::min<std::int64_t>(spec.head_dim, kMergedDims) : spec.head_dim;
  const std::int64_t states = kConsumerWarps * group * (merged + 2);
  const std::int64_t raw = (group + 2) * spec.head_dim;
  const std::int64_t ready = (2 * group + 2) * spec.head_dim / 2 + 4;
  return states + raw + ready;
}

// What a layer has that nothing computes on a GPU, neither the streaming kernels nor prefill. Empty
// if there is nothing.
std::string uncomputed_because(const LayerSpec& spec);

// What streams through the ring.
enum class Stream : std::int32_t { qkv, mlp_up, attention, mlp_down, attention_out, lm_head, none };

// The matrices of a phase are scheduled together, one after the other.
struct Phase {
  Stream first = Stream::none;
  Stream second = Stream::none;
  bool attention_before = false;  // each SM's own share of attention comes in front
};

constexpr std::int32_t layer_phases(bool parallel_residual) noexcept {
  return parallel_residual ? 2 : 4;
}

// Phase `index` of a layer. Each stream comes behind those whose results it needs.
constexpr Phase layer_phase(bool parallel_residual, std::int32_t index) noexcept {
  if (parallel_residual)
    return index == 0 ? Phase{Stream::qkv, Stream::mlp_up}
                      : Phase{Stream::mlp_down, Stream::attention_out, true};
  switch (index) {
    case 0: return {Stream::qkv};
    case 1: return {Stream::attention_out, Stream::none, true};
    case 2: return {Stream::mlp_up};
    default: return {Stream::mlp_down};
  }
}

// The attention of a layer with parallel residual, `tasks` of them (a split of a head each), lies
// between the two phases. With heads so wide that it would not be over when its output is to be
// projected, and where enough SMs have none, those that have some take no more chunks of the first
// phase from the midst of the MLP's rows on: others do the rest.
constexpr bool leaves_for_attention(std::int32_t tasks, std::int32_t head_dim,
                                    std::int32_t sm_count) noexcept {
  return head_dim > 128 && 5 * tasks <= 3 * sm_count;
}
constexpr std::int32_t leave_for_attention_from(std::int32_t qkv_chunks,
                                                std::int32_t mlp_up_chunks) noexcept {
  return qkv_chunks + mlp_up_chunks / 2;
}

// How the chunks of a phase are assigned to SMs: statically at first, round-robin (chunk r sm_count
// + s in round r goes to SM s), so that nobody waits for a ticket when the phase begins; then
// dynamically, by ticket, because memory does not serve SMs equally.
struct WorkSchedule {
  std::int32_t static_rounds = 0;
  std::int32_t first_dynamic = 0;  // first chunk that is drawn by ticket
};
constexpr WorkSchedule work_schedule(std::int32_t chunks, std::int32_t static_percent,
                                     std::int32_t sm_count) noexcept {
  const std::int32_t rounds =
      static_cast<std::int32_t>(static_cast<std::int64_t>(chunks) * static_percent / 100) /
      sm_count;
  return {rounds, rounds * sm_count};
}

struct DecodePlan {
  MatrixPlan qkv, attention_out, mlp_up, mlp_down, lm_head;
  KvPlan kv;
  // A ring stage: a chunk or KV block, and behind it the biases of the chunk's rows. Both multiples
  // of 128.
  std::int64_t data_bytes = 0;
  std::int64_t stage_bytes = 0;
  std::int32_t stages = 0;
  std::int64_t input_bytes = 0;   // of the normalised inputs, a multiple of 128
  std::int32_t sum_slots = 0;     // float32 partial sums that fit beside the ring
  std::int64_t shared_bytes = 0;  // of the whole block
  LayerKind kind = LayerKind::plain;
};

// Errors: unsupported if the model's shape cannot be streamed by this kernel (names the number that
// does not fit) or the device's shared memory is too small for two stages.
DecodePlan make_decode_plan(const ModelConfig& config, const DeviceLimits& limits);

// How a cache of `dtype`, the weights' type or float32, is laid out that no streaming kernel reads:
// whole pages. Errors: unsupported (head size).
KvPlan make_page_plan(const ModelConfig& config, DType dtype);

// Whether make_decode_plan() gives a plan, for callers that have another way.
bool can_stream(const ModelConfig& config, const DeviceLimits& limits);

// Why no streaming kernel decodes the model: what unstreamed_because() of its layer says, or that
// its sizes do not stream on such a device. Empty if can_stream().
std::string unstreamed_because(const ModelConfig& config, const DeviceLimits& limits);

// The fragments of a matrix that a lane of a kernel holds, at most: there are two sizes of kernels.
inline constexpr std::int32_t kNarrowFragments = 5, kWideFragments = 10;

// The same matrix with both halves of the activations in one product (half as many products), where
// a kernel of `fragments` has code for that; else as it is.
MatrixPlan with_packed_operands(MatrixPlan plan, std::int32_t fragments = kNarrowFragments);

// Attention of one sequence with `positions` keys (the current one included).
struct AttentionSplits {
  std::int32_t blocks = 0;            // KV blocks in use, of one head
  std::int32_t blocks_per_split = 0;  // consecutive blocks that one ticket handles
  std::int32_t splits = 0;            // of one head
};

// The most splits of a head: one lane of a warp looks at each.
inline constexpr std::int32_t kMaxSplits = 16;
// Less of keys and values (2-byte elements) is not worth the way of a split's result through the
// combiners.
inline constexpr std::int32_t kMinSplitBytes = 80 * 1024;

// At most one task (a split of a head) for each SM: its fixed cost does not repeat, and what is
// uneven is evened out by the chunks behind it, which go by ticket. The same arithmetic runs on the
// device, on the position that it has reached.
constexpr AttentionSplits attention_splits(std::int32_t positions, std::int32_t block_positions,
                                           std::int32_t num_heads, std::int32_t head_dim,
                                           std::int32_t sm_count) {
  const std::int32_t most = sm_count / num_heads;
  const std::int32_t max_splits = most < 1 ? 1 : most > kMaxSplits ? kMaxSplits : most;
  const std::int32_t pages = (positions + kKvPagePositions - 1) / kKvPagePositions;
  const std::int32_t even_share = (pages + max_splits - 1) / max_splits;
  const std::int32_t page_bytes = kKvPagePositions * head_dim * 4;
  const std::int32_t least = page_bytes >= kMinSplitBytes ? 1 : kMinSplitBytes / page_bytes;
  const std::int32_t pages_per_split = even_share < least ? least : even_share;
  AttentionSplits result;
  result.blocks = (positions + block_positions - 1) / block_positions;
  result.blocks_per_split = pages_per_split * (kKvPagePositions / block_positions);
  result.splits = (result.blocks + result.blocks_per_split - 1) / result.blocks_per_split;
  return result;
}

}  // namespace clusterfusion::plan
