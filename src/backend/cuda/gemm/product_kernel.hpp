// Many rows times a layer's matrices: see product_kernel.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/gemm/product_params.hpp"

namespace clusterfusion::cuda {

// Of a block, at most.
inline constexpr std::int64_t kProductSharedBytes = 224 * 1024;

// What one block of the kernel can compute, for so many rows in all.
struct ProductBlock {
  std::int32_t rows;
  std::int32_t max_chunks;
};
ProductBlock product_block(std::int32_t rows);

// Before the first launch, once.
void prepare_products(DType dtype);

void launch_products(DType dtype, const ProductParams& params, cudaStream_t stream);

}  // namespace clusterfusion::cuda
