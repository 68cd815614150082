// What the roles of the streaming decode kernel share: shared memory, the ids of what streams, and
// where things lie.
#pragma once

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/device/counter.cuh"
#include "backend/cuda/device/flow.cuh"
#include "backend/cuda/device/reduce.cuh"
#include "backend/cuda/device/ring.cuh"

namespace clusterfusion::cuda {

using namespace device;
using plan::Stream;

inline constexpr int kConsumerThreads = plan::kConsumerWarps * 32;
inline constexpr int kMaxChunkSlots = 256;

// Shared memory: control, activations, sums, ring. The sizes are those of DecodePlan.
struct SharedControl {
  RingControl ring;
  float reduce[2][plan::kConsumerWarps];
  Candidate candidate[plan::kConsumerWarps];
  int chunk_of_slot[kMaxChunkSlots];
  int token;
  std::uint32_t zero;
  // Epochs that the consumers have begun: what they wrote and read in earlier ones is done.
  std::uint32_t begun;
  // Epochs e that all blocks have begun, as this block knows: the flow set of epoch e + 1 is empty
  // and may be used, and KV entries of the epochs before e may be streamed.
  std::uint32_t swept;
};
static_assert(sizeof(SharedControl) <= plan::kControlBytes);

// The id of a ring stage: what it holds, and of which epoch.
__device__ __forceinline__ int ring_id(int epoch, plan::Stream stream) {
  return epoch * 8 + static_cast<int>(stream);
}

// Epochs of a step: its layers, and the LM head.
__device__ __forceinline__ int epochs_per_step(const DecodeParams& p) { return p.num_layers + 1; }

__device__ __forceinline__ plan::AttentionSplits splits_at(const DecodeParams& p, int position) {
  return plan::attention_splits(position + 1, p.kv_block_positions, p.num_heads, gridDim.x);
}

__device__ __forceinline__ char* kv_block(const DecodeParams& p, int layer, int head, int block) {
  const int first = block * p.kv_block_positions;
  const int block_in_page = first % plan::kKvPagePositions / p.kv_block_positions;
  return p.kv_pages[first / plan::kKvPagePositions] +
         static_cast<std::int64_t>(layer * p.num_heads + head) * p.kv_head_bytes +
         static_cast<std::int64_t>(block_in_page) * p.kv_block_bytes;
}

template <typename T>
__device__ __forceinline__ const T* of_layer(const DecodeParams& p, const T* of_first, int layer) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(of_first) +
                                    layer * p.layer_stride);
}
__device__ __forceinline__ const void* of_layer(const DecodeParams& p, const void* of_first,
                                                int layer) {
  return of_layer(p, static_cast<const char*>(of_first), layer);
}
__device__ __forceinline__ StreamedLayer layer_at(const DecodeParams& p, int layer) {
  const StreamedLayer& first = p.first_layer;
  return {of_layer(p, first.qkv, layer),
          of_layer(p, first.attention_out, layer),
          of_layer(p, first.mlp_up, layer),
          of_layer(p, first.mlp_down, layer),
          of_layer(p, first.input_norm_weight, layer),
          of_layer(p, first.input_norm_bias, layer),
          of_layer(p, first.post_norm_weight, layer),
          of_layer(p, first.post_norm_bias, layer),
          of_layer(p, first.qkv_bias, layer),
          of_layer(p, first.attention_out_bias, layer),
          of_layer(p, first.mlp_up_bias, layer),
          of_layer(p, first.mlp_down_bias, layer)};
}

// Where element `index` of a vector of activations lies: of each 8, the words (pairs) 1 and 2
// change places, so that the words of an operand of the tensor cores lie side by side.
__device__ __forceinline__ int operand_order(int index) {
  return (index & ~6) | (index & 2) << 1 | (index & 4) >> 1;
}

__device__ __forceinline__ char* flow_set(const DecodeParams& p, int epoch) {
  return p.flow + static_cast<std::int64_t>(epoch % kFlowSets) * p.layout.bytes;
}

}  // namespace clusterfusion::cuda
