// Finding and launching the streaming decode kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/decode/decode_params.hpp"

namespace clusterfusion::cuda {

// The producer is one thread of a warpgroup of its own, so that the consumers can have its
// registers.
inline constexpr int kDecodeBlockThreads = plan::kConsumerThreads + 128;

// Whether kernels that hold so many fragments at most have code for plan::with_packed_operands.
constexpr bool has_packed_operands(plan::LayerKind kind, int fragments) noexcept {
  return kind == plan::LayerKind::any || fragments <= plan::kNarrowFragments;
}

struct DecodeKernel {
  const void* function = nullptr;
  int fragments = 0;  // that a lane can hold of a matrix
};

// The kernel for such layers with weights of `dtype` (float16 or bfloat16), at least `fragments`
// fragments a matrix, and this head size. Errors: unsupported if there is none.
DecodeKernel find_decode_kernel(plan::LayerKind kind, DType dtype, int fragments, int head_dim);

// Launches on `stream`, one block on each of `sm_count` SMs, all resident together.
// Errors: those of CUDA, among them a device on which the blocks do not fit together.
void launch_decode(const void* kernel, const DecodeParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream);

}  // namespace clusterfusion::cuda
