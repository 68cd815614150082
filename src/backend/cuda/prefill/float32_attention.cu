#include "backend/cuda/prefill/float32_attention.cuh"
#include "backend/cuda/prefill/float32_attention.hpp"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

template <typename T, int kPairs>
AttentionKernel instance() {
  using Shape = Float32AttentionShape<kPairs>;
  return {reinterpret_cast<const void*>(float32_attention_kernel<T, kPairs>), Shape::kRows,
          Shape::kSharedBytes};
}

}  // namespace

AttentionKernel float32_attention(DType weights_dtype, std::int64_t head_dim) {
  AttentionKernel kernel;
  with_type(weights_dtype, [&](auto type) {
    using T = decltype(type);
    kernel = head_dim <= 64    ? instance<T, 1>()
             : head_dim <= 128 ? instance<T, 2>()
                               : instance<T, 4>();
  });
  return kernel;
}

}  // namespace clusterfusion::cuda
