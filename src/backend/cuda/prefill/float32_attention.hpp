// Attention over keys and values of float32.
#pragma once

#include <cstdint>

#include "backend/cuda/prefill/attention.hpp"

namespace clusterfusion::cuda {

// For head sizes that are multiples of 16 up to 256; the outputs have the weights' 16-bit type.
AttentionKernel float32_attention(DType weights_dtype, std::int64_t head_dim);

}  // namespace clusterfusion::cuda
