// Finding and launching the fused layer kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "backend/cuda/ops/layer_params.hpp"

namespace clusterfusion::cuda {

// The kernel for weights of `dtype` (float16 or bfloat16), at most `iterations` fragments a matrix,
// this head size, and caches in rows or in pages; null if there is none.
const void* find_layer_kernel(DType dtype, int iterations, int head_dim, bool in_pages);

// Launches `kernel`, as the driver knows it on the current device, on `stream`: a block for each of
// `sm_count` SMs, of which any number may be had. Blocks may take their places while the launch
// before ends.
void launch_layer(CUfunction kernel, const LayerParams& params, int sm_count,
                  std::int64_t shared_bytes, cudaStream_t stream);

}  // namespace clusterfusion::cuda
