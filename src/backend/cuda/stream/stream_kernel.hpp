// Finding and launching the streaming kernel for many rows.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {

struct StreamKernel {
  const void* function = nullptr;
  std::int32_t task_queries = 0;  // queries of an attention task, at most
};
// The kernel for weights of `dtype` (float16 or bfloat16), this head size, activations of 8 or 16
// rows, and chunks of a matrix of at most so many ring stages, 2 or 4. No function if there is
// none.
StreamKernel find_stream_kernel(DType dtype, std::int64_t head_dim, std::int32_t operand_rows,
                                std::int32_t pieces);

// Launches on `stream`, one block on each of `sm_count` SMs, all resident together.
// Errors: those of CUDA, among them a device on which the blocks do not fit together.
void launch_stream(const void* kernel, const StreamParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream);

}  // namespace clusterfusion::cuda
