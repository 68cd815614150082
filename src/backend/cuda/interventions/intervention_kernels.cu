#include "backend/cuda/check.hpp"
#include "backend/cuda/interventions/intervention_kernels.hpp"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(std::int64_t items) {
  return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

__device__ __forceinline__ const float* steering_at(const DeviceSteering& steering, int position,
                                                    int hidden) {
  if (steering.rows == nullptr || steering.everywhere != 0) return steering.rows;
  return position < steering.positions
             ? steering.rows + static_cast<std::int64_t>(position) * hidden
             : nullptr;
}

// One block a row.
__global__ void steer(float* x, const DeviceSteering steering, int first_position, int hidden) {
  const float* from = steering_at(steering, first_position + static_cast<int>(blockIdx.x), hidden);
  if (from == nullptr) return;
  float* row = x + static_cast<std::int64_t>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden; i += kThreads) row[i] += from[i];
}

__global__ void add(float* x, const float* y, std::int64_t count) {
  const std::int64_t i = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x;
  if (i < count) x[i] += y[i];
}

// Over a block, in a fixed order.
__device__ float block_sum(float value) {
  __shared__ float partial[kThreads / 32];
  value = device::warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += partial[warp];
  return total;
}

// One block a row.
template <typename T>
__global__ void final_norm(NormKind kind, const float* x, const T* weight, const T* bias, float eps,
                           float* output, int hidden) {
  const float* row = x + static_cast<std::int64_t>(blockIdx.x) * hidden;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < hidden; i += kThreads) sum += row[i];
  const float mean =
      kind == NormKind::rms_norm ? 0.0f : block_sum(sum) / static_cast<float>(hidden);
  float squares = 0.0f;
  for (int i = threadIdx.x; i < hidden; i += kThreads) squares += (row[i] - mean) * (row[i] - mean);
  const float variance = block_sum(squares) / static_cast<float>(hidden);
  const float inverse_deviation = rsqrtf(variance + eps);
  float* to = output + static_cast<std::int64_t>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden; i += kThreads)
    to[i] = fmaf((row[i] - mean) * inverse_deviation, static_cast<float>(weight[i]),
                 bias == nullptr ? 0.0f : static_cast<float>(bias[i]));
}

// blockIdx.y is the layer.
__global__ void steer_biases(const SteeredBiases all, int position) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int layer = static_cast<int>(blockIdx.y);
  if (i >= all.hidden) return;
  const std::int64_t offset = layer * all.layer_stride;
  float value = 0.0f;
  if (all.ablated_mlps[layer] == 0 && all.model_biases != nullptr)
    value = reinterpret_cast<const float*>(all.model_biases + offset)[i];
  if (layer + 1 < all.layers) {
    const float* steering = steering_at(all.steering[layer + 1], position, all.hidden);
    if (steering != nullptr) value += steering[i];
  }
  reinterpret_cast<float*>(all.steered_biases + offset)[i] = value;
}

}  // namespace

void launch_steer(float* x, const DeviceSteering& steering, std::int64_t first_position,
                  std::int64_t count, std::int64_t hidden, cudaStream_t stream) {
  steer<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      x, steering, static_cast<int>(first_position), static_cast<int>(hidden));
  check(cudaGetLastError(), "starting to steer");
}

void launch_add(float* x, const float* y, std::int64_t count, cudaStream_t stream) {
  add<<<blocks_for(count), kThreads, 0, stream>>>(x, y, count);
  check(cudaGetLastError(), "starting an addition");
}

void launch_final_norm(DType dtype, NormKind kind, const float* x, const void* weight,
                       const void* bias, float eps, float* output, std::int64_t count,
                       std::int64_t hidden, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    final_norm<T><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
        kind, x, static_cast<const T*>(weight), static_cast<const T*>(bias), eps, output,
        static_cast<int>(hidden));
  });
  check(cudaGetLastError(), "starting the final norm");
}

void launch_steer_biases(const SteeredBiases& biases, std::int32_t position, cudaStream_t stream) {
  const dim3 grid(blocks_for(biases.hidden), static_cast<unsigned>(biases.layers));
  steer_biases<<<grid, kThreads, 0, stream>>>(biases, position);
  check(cudaGetLastError(), "starting to steer biases");
}

}  // namespace clusterfusion::cuda
