// Epochs of a launch of a streaming kernel, and where their data lies. An epoch is a layer, or the
// LM head, of one step. `Params`: DecodeParams or StreamParams.
#pragma once

#include <cstdint>

#include "backend/cuda/decode/decode_params.hpp"

namespace clusterfusion::cuda {

using plan::kConsumerThreads;
inline constexpr int kNever = 0x7fffffff;  // of a chunk: none is so late
inline constexpr int kMaxPhases = 5;       // of a layer, and the LM head

// Of a step: its layers, and the LM head.
template <typename Params>
__device__ __forceinline__ int epochs_per_step(const Params& p) {
  return p.num_layers + 1;
}

template <typename Params>
__device__ __forceinline__ char* lamport_set(const Params& p, int epoch) {
  return p.lamport + static_cast<std::int64_t>(epoch % kLamportSets) * p.layout.bytes;
}

// A tensor of layer `layer`, from that of the first layer.
template <typename Params>
__device__ __forceinline__ const char* of_layer(const Params& p, const void* of_first, int layer) {
  return static_cast<const char*>(of_first) + layer * p.layer_stride;
}

}  // namespace clusterfusion::cuda
