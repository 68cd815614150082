// Everything the plain layer kernels are told: plain data, filled by the host. The arithmetic here
// is the host's and the device's, and tested on the host.
#pragma once

#include <bit>
#include <cstdint>

#include "backend/layer_ops.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

// Threads of a block of each plain kernel.
inline constexpr int kPlainThreads = 256;

// Rows of a matrix that a warp multiplies side by side, and those of a block's warps.
inline constexpr int kRowsPerWarp = 2;
inline constexpr int kRowsPerBlock = kRowsPerWarp * kPlainThreads / 32;

// Positions that a block attends to at once.
inline constexpr int kTilePositions = plan::kKvPagePositions;
// Blocks of attention that an SM may have at once, so that their loads hide each other's latency.
inline constexpr int kAttentionBlocksPerSm = 4;

// Tokens that a kernel multiplies a matrix with at once, for so many rows of the call: so many
// kernels there are, and so many sizes of scratch.
constexpr int tokens_at_once(std::int64_t rows) { return rows == 1 ? 1 : rows <= 4 ? 4 : 16; }

// Sizes of a layer, in elements of one token.
struct PlainShape {
  std::int64_t hidden, intermediate;
  std::int64_t heads, kv_heads, group;  // `group` query heads share one of keys and values
  std::int64_t head_dim, rotary_dim;
  std::int64_t attention;  // all queries, and what the heads give
  std::int64_t kv;         // all keys, and all values
  std::int64_t qkv;        // all of these together
};

inline PlainShape plain_shape(const LayerSpec& spec) {
  return {.hidden = spec.hidden_size,
          .intermediate = spec.intermediate_size,
          .heads = spec.num_heads,
          .kv_heads = spec.kv_heads(),
          .group = spec.heads_per_kv_head(),
          .head_dim = spec.head_dim,
          .rotary_dim = spec.rotary_dim,
          .attention = spec.attention_size(),
          .kv = spec.kv_size(),
          .qkv = spec.qkv_size()};
}

// How the context of each head is cut when `positions` rows are there, the new one included: a
// split is so many consecutive tiles. It depends on nothing else of a call, so that a row has the
// same bits in any company and in any cache.
constexpr plan::AttentionSplits plain_splits(const PlainShape& shape, int positions, int sm_count) {
  return plan::attention_splits(positions, kTilePositions, static_cast<int>(shape.heads),
                                static_cast<int>(shape.head_dim), kAttentionBlocksPerSm * sm_count);
}

// At least as many splits as plain_splits() gives for any number of positions up to
// `max_positions`. In few steps: scratch has a size for each.
constexpr int most_plain_splits(const PlainShape& shape, std::int64_t max_positions, int sm_count) {
  const std::int64_t tasks = kAttentionBlocksPerSm * sm_count / shape.heads;
  const std::int64_t tiles = (max_positions + kTilePositions - 1) / kTilePositions;
  const std::int64_t most = tasks < plan::kMaxSplits ? tasks : plan::kMaxSplits;
  if (tiles >= most) return most < 1 ? 1 : static_cast<int>(most);
  const auto useful = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(tiles)));
  return static_cast<int>(useful < most ? useful : most);
}

// What the kernels hand over to each other: float32 vectors of each row, at these elements of the
// scratch, each array at a multiple of 16 bytes.
struct PlainLayout {
  std::int64_t positions;    // [rows] int32: where each new token goes; -1: nowhere
  std::int64_t normed;       // [rows, hidden]: the input, normalised for attention
  std::int64_t post_normed;  // [rows, hidden]: and for the MLP
  std::int64_t qkv;          // [rows, qkv]: in the order of the matrix's rows, with bias
  std::int64_t query;  // [rows, heads, head_dim]: rotated, scaled so that scores are of base 2
  std::int64_t intermediate;  // [rows, intermediate]: after the activation, and the gate
  std::int64_t maxima;        // [rows, heads, splits]: the largest score of a split
  std::int64_t sums;          // [rows, heads, splits]: of the softmax's weights, relative to it
  std::int64_t outputs;       // [rows, heads, splits, head_dim]: of the values, weighted by these
  std::int64_t attention;     // [rows, heads, head_dim]: what the splits give together
  std::int64_t projected;     // [rows, hidden]: and their projection, where the MLP follows it
  std::int64_t size;
};

constexpr PlainLayout plain_layout(const PlainShape& shape, std::int64_t rows, int splits) {
  PlainLayout layout{};
  const auto take = [&](std::int64_t elements) {
    const std::int64_t begin = layout.size;
    layout.size += (rows * elements + 3) / 4 * 4;
    return begin;
  };
  layout.positions = take(1);
  layout.normed = take(shape.hidden);
  layout.post_normed = take(shape.hidden);
  layout.qkv = take(shape.qkv);
  layout.query = take(shape.attention);
  layout.intermediate = take(shape.intermediate);
  layout.maxima = take(shape.heads * splits);
  layout.sums = take(shape.heads * splits);
  layout.outputs = take(shape.attention * splits);
  layout.attention = take(shape.attention);
  layout.projected = take(shape.hidden);
  return layout;
}

struct PlainParams {
  LayerWork work;
  PlainShape shape;
  float norm_eps;
  int sm_count;
  int splits;      // most_plain_splits()
  float* scratch;  // null where only the second half is asked for
  PlainLayout layout;
  // Which half a launch computes, of what both have: norms, and the matrices behind them.
  bool of_attention, of_mlp;
};

}  // namespace clusterfusion::cuda
