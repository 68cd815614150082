// From a plan to the parameters of the streaming kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/decode/decode_params.hpp"
#include "clusterfusion/model.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

// Settings of both streaming kernels.
// Results that cross between SMs wait behind copies in flight: no more of them.
inline constexpr std::int32_t kMaxInFlight = 2;
// Late in a phase they may be more; in layers of any kind, which have more phases and wait more
// often, while an SM multiplies.
inline constexpr std::int32_t kLateInFlight = 3, kLatePercent = 60;
inline constexpr std::int32_t kBusyInFlightOfAny = 4;
// A part of a phase is assigned statically, so that nobody waits for a ticket when it begins; of a
// long phase of layers of any kind more.
inline constexpr std::int32_t kStaticPercent = 30, kLongStaticPercentOfAny = 80;

// What both kernels' parameters say of a model's shape and of its KV cache.
template <typename Params>
void set_shape(Params& p, const ModelConfig& config, const plan::KvPlan& kv) {
  p.num_layers = static_cast<std::int32_t>(config.num_layers);
  p.hidden_size = static_cast<std::int32_t>(config.hidden_size);
  p.intermediate_size = static_cast<std::int32_t>(config.intermediate_size);
  p.num_heads = static_cast<std::int32_t>(config.num_heads);
  p.head_dim = static_cast<std::int32_t>(config.head_dim);
  p.rotary_dim = static_cast<std::int32_t>(config.rotary_dim);
  p.vocab_size = static_cast<std::int32_t>(config.vocab_size);
  p.layer_norm_eps = static_cast<float>(config.layer_norm_eps);
  p.inverse_hidden_size = 1.0f / static_cast<float>(config.hidden_size);
  p.activation = config.activation;
  p.parallel_residual = config.parallel_residual;
  p.kv_head_bytes = static_cast<std::int32_t>(kv.head_bytes);
  p.kv_block_bytes = static_cast<std::int32_t>(kv.block_bytes);
  p.kv_block_positions = kv.block_positions;
}

// Shape, matrices, ring and the layout of Lamport buffers; pointers stay null. `packed_fragments`:
// of a kernel that has code for plan::with_packed_operands, else 0.
DecodeParams stream_params(const ModelConfig& config, const plan::DecodePlan& plan,
                           std::int32_t sm_count, int packed_fragments);

// What plans must know of the device.
plan::DeviceLimits limits_of(const cudaDeviceProp& properties);

// Lets more copies be under way late in a phase, or while an SM multiplies: for kernels of many
// layers.
void read_more_at_once(DecodeParams& params, plan::LayerKind kind);

// Fragments that a lane of the kernel must be able to hold.
int fragments_needed(const ModelConfig& config, const plan::DecodePlan& plan);

// Lets a kernel have all the shared memory that a block may have: models of several shapes share a
// kernel, and the limit is the kernel's. Errors: unsupported if not even one block of this plan
// fits on an SM, because all blocks have to be resident together.
void prepare_kernel(const void* kernel, const plan::DecodePlan& plan,
                    const cudaDeviceProp& properties);

}  // namespace clusterfusion::cuda
