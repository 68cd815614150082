// Shared memory of the attention kernel for many rows, for host and device.
#pragma once

#include <cstdint>

#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda::gemm {

inline constexpr std::int32_t kMaxAttentionWarps = 8;
// Groups of positions in a warp's ring.
inline constexpr std::int32_t kAttentionStages = 4;

// Of one warp.
struct AttentionMemory {
  std::int32_t ring_bytes;    // then scratch of stream::Attention
  std::int32_t extra_floats;  // in scratch, where the states of further rows begin
  std::int32_t warp_bytes;
};
constexpr AttentionMemory attention_memory(std::int32_t head_dim) {
  const std::int32_t ring = kAttentionStages * 2 * plan::kMinKvBlockPositions * head_dim * 2;
  const std::int32_t states = plan::kConsumerWarps * (head_dim + 2);
  const std::int32_t vectors = (plan::kTaskQueries + plan::kMaxSequenceRows) * 2 * head_dim * 2;
  const std::int32_t extra = states + vectors / 4;
  const std::int32_t bytes = ring + (extra + (plan::kTaskQueries - 1) * states) * 4;
  return {ring, extra, (bytes + 127) / 128 * 128};
}

}  // namespace clusterfusion::cuda::gemm
