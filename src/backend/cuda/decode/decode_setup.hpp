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
// Late in a phase they may be more.
inline constexpr std::int32_t kLateInFlight = 3;
inline constexpr std::int32_t kLatePercent = 60;
// A part of a phase is assigned statically, so that nobody waits for a ticket when it begins.
inline constexpr std::int32_t kStaticPercent = 30;

// Shape, matrices, ring and the layout of Lamport buffers; pointers stay null. `packed_operands`:
// whether the kernel has code for plan::with_packed_operands.
DecodeParams stream_params(const ModelConfig& config, const plan::DecodePlan& plan,
                           std::int32_t sm_count, bool packed_operands);

// What plans must know of the device.
plan::DeviceLimits limits_of(const cudaDeviceProp& properties);

// Lets more copies be under way late in a phase, for kernels of many layers.
void read_more_late(DecodeParams& params);

// Fragments that a lane of the kernel must be able to hold.
int fragments_needed(const ModelConfig& config, const plan::DecodePlan& plan);

// Whether the build holds machine code for this GPU: Hopper (9.0) and Blackwell (12.0).
bool has_kernels_for(const cudaDeviceProp& properties);

// Lets a kernel have all the shared memory that a block may have: models of several shapes share a
// kernel, and the limit is the kernel's. Errors: unsupported if not even one block of this plan
// fits on an SM, because all blocks have to be resident together.
void prepare_kernel(const void* kernel, const plan::DecodePlan& plan,
                    const cudaDeviceProp& properties);

}  // namespace clusterfusion::cuda
