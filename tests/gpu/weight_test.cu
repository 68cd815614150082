// The weights of top-p on the device against those of the host: the same integers.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <vector>

#include "backend/cuda/sampling/device_arithmetic.cuh"
#include "sampling/weight.hpp"

namespace clusterfusion::test {
namespace {

// weights[i] is of the score -(float with bits i * stride).
__global__ void weigh(std::uint64_t* weights, std::uint32_t count, std::uint32_t stride) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float score = -__uint_as_float(i * stride);
  weights[i] = weight_with<cuda::DeviceArithmetic>(score);
}

TEST(DeviceWeight, IsTheHosts) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no NVIDIA GPU";
  constexpr std::uint32_t kStride = 67;
  // From 0 to a little more than the lowest score that weighs anything.
  const std::uint32_t count = std::bit_cast<std::uint32_t>(28.6f) / kStride;
  std::uint64_t* on_device = nullptr;
  ASSERT_EQ(cudaMalloc(&on_device, count * sizeof(std::uint64_t)), cudaSuccess);
  weigh<<<(count + 255) / 256, 256>>>(on_device, count, kStride);
  std::vector<std::uint64_t> weights(count);
  ASSERT_EQ(
      cudaMemcpy(weights.data(), on_device, count * sizeof(std::uint64_t), cudaMemcpyDeviceToHost),
      cudaSuccess);
  ASSERT_EQ(cudaFree(on_device), cudaSuccess);
  for (std::uint32_t i = 0; i < count; ++i) {
    const float score = -std::bit_cast<float>(i * kStride);
    ASSERT_EQ(weights[i], weight_of(score)) << "score " << score << ", bits " << i * kStride;
  }
}

}  // namespace
}  // namespace clusterfusion::test
