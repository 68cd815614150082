// Products for a build whose kernels racecheck follows: cuBLASLt's fault under that tool.
#pragma once

#include "backend/cuda/prefill/matrix_product.hpp"

namespace clusterfusion::cuda {

// What MatrixProducts::multiply() does, slowly: a thread adds up one sum. Errors: internal.
void multiply_plainly(DType dtype, const Product& product, cudaStream_t stream);

}  // namespace clusterfusion::cuda
