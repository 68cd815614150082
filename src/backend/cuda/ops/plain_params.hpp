// Everything the plain layer kernels are told: plain data, filled by the host. The arithmetic here
// is the host's and the device's, and tested on the host.
#pragma once

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

// How the context of each head is cut when `positions` rows are there, the new one included: a
// split is so many consecutive tiles.
constexpr plan::AttentionSplits plain_splits(const LayerShape& shape, int positions, int sm_count) {
  return plan::attention_splits(positions, kTilePositions, static_cast<int>(shape.num_heads),
                                static_cast<int>(shape.head_dim), kAttentionBlocksPerSm * sm_count);
}

// The most splits that plain_splits() gives for any number of positions.
constexpr int most_plain_splits(const LayerShape& shape, int sm_count) {
  const std::int64_t tasks = kAttentionBlocksPerSm * sm_count / shape.num_heads;
  const std::int64_t tiles = (shape.max_positions + kTilePositions - 1) / kTilePositions;
  const std::int64_t most = tasks < plan::kMaxSplits ? tasks : plan::kMaxSplits;
  const std::int64_t useful = tiles < most ? tiles : most;
  return useful < 1 ? 1 : static_cast<int>(useful);
}

// What the kernels hand over to each other: float32 vectors, at these elements of the scratch, each
// at a multiple of 16 bytes.
struct PlainLayout {
  std::int64_t normed;        // [hidden]: the input, normalised for attention
  std::int64_t post_normed;   // [hidden]: and for the MLP
  std::int64_t qkv;           // [heads, 3, head_dim]: with bias, before the rotation
  std::int64_t query;         // [heads, head_dim]: rotated, scaled so that scores are of base 2
  std::int64_t intermediate;  // [intermediate]: after the activation
  std::int64_t maxima;        // [heads, splits]: the largest score of a split
  std::int64_t sums;          // [heads, splits]: of the softmax's weights, relative to it
  std::int64_t outputs;       // [heads, splits, head_dim]: of the values, weighted by these
  std::int64_t attention;     // [hidden]: what the splits give together
  std::int64_t size;
};

constexpr PlainLayout plain_layout(const LayerShape& shape, int splits) {
  PlainLayout layout{};
  const auto take = [&](std::int64_t elements) {
    const std::int64_t begin = layout.size;
    layout.size += (elements + 3) / 4 * 4;
    return begin;
  };
  layout.normed = take(shape.hidden_size);
  layout.post_normed = take(shape.hidden_size);
  layout.qkv = take(3 * shape.hidden_size);
  layout.query = take(shape.hidden_size);
  layout.intermediate = take(shape.intermediate_size);
  layout.maxima = take(shape.num_heads * splits);
  layout.sums = take(shape.num_heads * splits);
  layout.outputs = take(shape.hidden_size * splits);
  layout.attention = take(shape.hidden_size);
  return layout;
}

struct PlainParams {
  LayerTask task;
  int sm_count;
  int splits;  // most_plain_splits()
  float* scratch;
  PlainLayout layout;
};

}  // namespace clusterfusion::cuda
