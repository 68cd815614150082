// Shared memory of the attention kernel for many rows, for host and device.
#pragma once

#include <cstdint>

#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda::gemm {

// Of a block.
inline constexpr std::int32_t kAttentionWarps = 2;
// Groups of positions in a warp's ring.
inline constexpr std::int32_t kAttentionStages = 2;

// Of a warp's ring: keys and values.
constexpr std::int32_t attention_ring_bytes(std::int32_t head_dim) {
  return kAttentionStages * 2 * plan::kMinKvBlockPositions * head_dim * 2;
}
// Zeros that stand for the values behind the last position.
inline constexpr std::int32_t kZeroBytes = 16;

// Of a block: the warps' rings, zeros, its task's.
constexpr std::int32_t attention_bytes(std::int32_t head_dim, const plan::TaskLayout& task) {
  return kAttentionWarps * attention_ring_bytes(head_dim) + kZeroBytes + task.bytes;
}

}  // namespace clusterfusion::cuda::gemm
