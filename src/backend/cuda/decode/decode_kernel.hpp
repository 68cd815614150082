// Finding and launching the streaming decode kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/decode/decode_params.hpp"

namespace clusterfusion::cuda {

// The producer is one thread of a warpgroup of its own, so that the consumers can have its
// registers.
inline constexpr int kDecodeBlockThreads = plan::kConsumerThreads + 128;

// Kernels that hold at most so many fragments have code for plan::with_packed_operands.
inline constexpr int kMaxPackedFragments = 5;

// The kernel for such layers with weights of `dtype` (float16 or bfloat16), at most `iterations`
// fragments a matrix, and this head size. Errors: unsupported if there is none.
const void* find_decode_kernel(plan::LayerKind kind, DType dtype, int iterations, int head_dim);

// Launches on `stream`, one block on each of `sm_count` SMs, all resident together.
// Errors: those of CUDA, among them a device on which the blocks do not fit together.
void launch_decode(const void* kernel, const DecodeParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream);

}  // namespace clusterfusion::cuda
