// Finding and launching the streaming kernel for many rows.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {

struct StreamKernelShape {
  std::int32_t operand_rows;  // 8 or 16
  std::int32_t pieces;        // ring stages of a matrix's chunk, at most: 2 or 4
  std::int32_t task_queries;  // queries of an attention task, at most
};
// The kernel for weights of `dtype` (float16 or bfloat16) and this head size; null if there is
// none.
const void* find_stream_kernel(DType dtype, std::int64_t head_dim, const StreamKernelShape& shape);

// Launches on `stream`, one block on each of `sm_count` SMs, all resident together.
// Errors: those of CUDA, among them a device on which the blocks do not fit together.
void launch_stream(const void* kernel, const StreamParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream);

}  // namespace clusterfusion::cuda
