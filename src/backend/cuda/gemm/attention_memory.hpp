// Shared memory of the attention kernel for many rows, for host and device.
#pragma once

#include <cstdint>

#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda::gemm {

// Of a block.
inline constexpr std::int32_t kAttentionWarps = 2;
// Groups of positions in a warp's ring.
inline constexpr std::int32_t kAttentionStages = 2;

struct AttentionMemory {
  std::int32_t ring_bytes;    // of each warp; then scratch of stream::Attention
  std::int32_t extra_floats;  // in scratch, where the states of further rows begin
  std::int32_t bytes;         // of a block
};
// `rows` of a task, at most, and of its sequence in a step.
constexpr AttentionMemory attention_memory(std::int32_t head_dim, std::int32_t rows,
                                           std::int32_t sequence_rows) {
  const std::int32_t ring = kAttentionStages * 2 * plan::kMinKvBlockPositions * head_dim * 2;
  const std::int32_t states = plan::kConsumerWarps * (head_dim + 2);
  const std::int32_t vectors = (plan::kTaskQueries + sequence_rows) * 2 * head_dim * 2;
  const std::int32_t extra = states + vectors / 4;
  return {ring, extra, kAttentionWarps * ring + (extra + (rows - 1) * states) * 4};
}

}  // namespace clusterfusion::cuda::gemm
