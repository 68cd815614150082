// The parameters of the fused layer kernel: plain data, filled by the host.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "backend/cuda/decode/decode_params.hpp"

namespace clusterfusion::cuda {

struct LayerParams {
  // Matrices, shape, ring and scratch as for a whole model of one layer. `lamport` has two sets,
  // `tickets` two times kLayerCounters; everything of the engine is unused.
  DecodeParams stream;
  // Scratch is for one launch at a time. Of its two halves, a launch uses one and clears the
  // other, which the launch before has used. Blocks of this launch and of the one before that have
  // started, modulo twice the blocks of a launch: so that tells which half is whose.
  std::uint32_t* started;

  bool attention_and_up;  // the first half: attention, its output projection, and the MLP's first
  bool down;              // the second half: the MLP's second matrix and the sum of all

  // 16-bit vectors of the caller; null where a half is not wanted.
  const void* input;       // [hidden]
  const void* attn_input;  // [hidden]: attention's output, if only the second half runs
  const void* mlp_input;   // [intermediate]: likewise
  void* attn_output;       // [hidden], if only the first half runs
  void* mlp_intermediate;  // [intermediate], likewise
  void* output;            // [hidden]
  void* k_new;             // [hidden]
  void* v_new;             // [hidden]

  void* k_cache;  // [max_positions, hidden], or pages
  void* v_cache;
  const float* cosines;  // [rotary_dim]
  const float* sines;
  std::int32_t max_positions;
  std::int32_t position;
  const std::int32_t* device_position;  // instead of `position`, or null

  // The caches as tensors of rows; a box is one head's share of kv_block_positions rows. Of pages:
  // [pages, page size, heads, head_dim]; a box is one head's share of pages.box_positions.
  CUtensorMap key_map;
  CUtensorMap value_map;

  // Where the caches lie in pages. Strides are in elements.
  struct Pages {
    const std::int32_t* table;  // of position 0 and those behind it
    std::int32_t count;
    std::int32_t size_log2;      // of a page, in positions
    std::int32_t box_positions;  // a divisor of a page and of a block
    std::int64_t page_stride, position_stride, head_stride;
  } pages;
};

// Counters of a half of the scratch: tickets of each phase, and shares of late blocks that have
// been given to others.
inline constexpr int kLayerPhases = 3;
inline constexpr int kLateShares = 4;
inline constexpr int kLayerCounters = kLayerPhases + kLateShares;

}  // namespace clusterfusion::cuda
