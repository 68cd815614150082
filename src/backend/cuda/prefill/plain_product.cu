#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "backend/cuda/check.hpp"
#include "backend/cuda/prefill/plain_product.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void multiply(const Product product) {
  const std::int64_t column = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  if (column >= product.out) return;
  const T* x = static_cast<const T*>(product.x) + blockIdx.y * product.in;
  const T* weight = static_cast<const T*>(product.weight) + column * product.in;
  float sum = product.bias == nullptr ? 0.0f : product.bias[column];
  for (std::int64_t i = 0; i < product.in; ++i) {
    sum = fmaf(static_cast<float>(x[i]), static_cast<float>(weight[i]), sum);
  }
  float& y = product.y[blockIdx.y * product.out + column];
  y = product.accumulate ? y + sum : sum;
}

}  // namespace

void multiply_plainly(DType dtype, const Product& product, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((product.out + kThreads - 1) / kThreads),
                  static_cast<unsigned>(product.rows));
  const auto kernel = dtype == DType::float16 ? multiply<__half> : multiply<__nv_bfloat16>;
  kernel<<<grid, kThreads, 0, stream>>>(product);
  check(cudaGetLastError(), "multiplying matrices");
}

}  // namespace clusterfusion::cuda
