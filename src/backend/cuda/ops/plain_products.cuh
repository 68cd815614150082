// The plain layer kernels of matrices: the two LayerNorms, and rows of 16-bit weights times a
// vector. Each warp computes its rows whole, in a fixed order.
#pragma once

#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ops/plain_load.cuh"
#include "backend/cuda/ops/plain_params.hpp"
#include "backend/cuda/ops/position.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"

namespace clusterfusion::cuda {

// Sum of value(element) over the `count` elements of x, by each warp for itself.
template <int kCount, typename T, typename Value>
__device__ __forceinline__ float warp_sum_over(const T* x, std::int64_t count, Value&& value) {
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x % 32 * kCount; i < count; i += 32 * kCount) {
    float elements[kCount];
    load(x + i, elements);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += value(elements[k]);
  }
  return device::warp_sum(sum);
}

struct RowMoments {
  float mean, inverse_deviation;
};

// Mean first, then the squares around it: safe for any mean.
template <int kCount, typename T>
__device__ __forceinline__ RowMoments moments_of(const T* x, std::int64_t count, float eps) {
  const auto n = static_cast<float>(count);
  const float mean = warp_sum_over<kCount>(x, count, [](float value) { return value; }) / n;
  const float squares = warp_sum_over<kCount>(
      x, count, [mean](float value) { return (value - mean) * (value - mean); });
  return {mean, rsqrtf(squares / n + eps)};
}

// A thread an element of both results. Each warp takes the moments of the whole input, which lies
// in L1 soon: nobody waits for another.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    normalise_input(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const std::int64_t hidden = in.shape.hidden_size;
  const T* x = static_cast<const T*>(in.input);
  const RowMoments moments = hidden % kVectorElements == 0
                                 ? moments_of<kVectorElements>(x, hidden, in.layer_norm_eps)
                                 : moments_of<1>(x, hidden, in.layer_norm_eps);
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= hidden) return;
  const float value = (static_cast<float>(x[i]) - moments.mean) * moments.inverse_deviation;
  const auto scaled = [&](LayerTensor weight) {
    return fmaf(value, static_cast<float>(static_cast<const T*>(in.weight(weight))[i]),
                static_cast<float>(static_cast<const T*>(in.weight(bias_of(weight)))[i]));
  };
  p.scratch[p.layout.normed + i] = scaled(LayerTensor::input_norm_weight);
  p.scratch[p.layout.post_normed + i] = scaled(LayerTensor::post_norm_weight);
}

// Row-major [rows, columns] weights; `bias` [rows] or null.
template <typename T>
struct PlainMatrix {
  __device__ __forceinline__ PlainMatrix(const LayerTask& task, LayerTensor weight,
                                         std::int64_t its_rows, std::int64_t its_columns)
      : weights(static_cast<const T*>(task.weight(weight))),
        bias(static_cast<const T*>(task.weight(bias_of(weight)))),
        rows(its_rows),
        columns(its_columns) {}

  const T* weights;
  const T* bias;
  std::int64_t rows, columns;
};

// Adds to `sums` this lane's share of the rows from `first` on times x [columns]. Behind the last
// row that one comes again.
template <int kCount, typename T, typename X>
__device__ __forceinline__ void add_products(const PlainMatrix<T>& matrix, std::int64_t first,
                                             const X* x, float (&sums)[kRowsPerWarp]) {
  const T* rows[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r)
    rows[r] = matrix.weights + min(first + r, matrix.rows - 1) * matrix.columns;
#pragma unroll 2
  for (std::int64_t i = threadIdx.x % 32 * kCount; i < matrix.columns; i += 32 * kCount) {
    float weights[kRowsPerWarp][kCount], values[kCount];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) load(rows[r] + i, weights[r]);
    load(x + i, values);
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) sums[r] = fmaf(weights[r][k], values[k], sums[r]);
  }
}

// Calls store(row, sum with bias) for each of this warp's rows of block `block`, in one lane each.
template <typename T, typename X, typename Store>
__device__ __forceinline__ void multiply(const PlainMatrix<T>& matrix, std::int64_t block,
                                         const X* x, Store&& store) {
  const std::int64_t first = block * kRowsPerBlock + threadIdx.x / 32 * kRowsPerWarp;
  if (first >= matrix.rows) return;
  float sums[kRowsPerWarp] = {};
  if (matrix.columns % kVectorElements == 0)
    add_products<kVectorElements>(matrix, first, x, sums);
  else
    add_products<1>(matrix, first, x, sums);
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const float sum = device::warp_sum(sums[r]);
    const std::int64_t row = first + r;
    if (threadIdx.x % 32 != r || row >= matrix.rows) continue;
    store(row, matrix.bias == nullptr ? sum : sum + static_cast<float>(matrix.bias[row]));
  }
}

// Blocks that multiply() wants for a matrix.
constexpr std::int64_t blocks_of_rows(std::int64_t rows) {
  return (rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

// The QKV matrix's blocks, and behind them those of the MLP's first. The MLP's activations are a
// result, or for the second half.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    multiply_normed(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const std::int64_t hidden = in.shape.hidden_size;
  const std::int64_t qkv_blocks = blocks_of_rows(3 * hidden);
  if (blockIdx.x < qkv_blocks) {
    multiply(PlainMatrix<T>(in, LayerTensor::qkv_weight, 3 * hidden, hidden), blockIdx.x,
             p.scratch + p.layout.normed,
             [&](std::int64_t row, float value) { p.scratch[p.layout.qkv + row] = value; });
    return;
  }
  const bool valid = is_position(in.shape, position_of(in));
  multiply(PlainMatrix<T>(in, LayerTensor::mlp_up_weight, in.shape.intermediate_size, hidden),
           blockIdx.x - qkv_blocks, p.scratch + p.layout.post_normed,
           [&](std::int64_t row, float value) {
             const float activated = valid ? activate(in.activation, value) : NAN;
             if (in.mlp_intermediate == nullptr)
               p.scratch[p.layout.intermediate + row] = activated;
             else
               static_cast<T*>(in.mlp_intermediate)[row] = static_cast<T>(activated);
           });
}

// Attention's output as a result.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    project_attention(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const std::int64_t hidden = in.shape.hidden_size;
  multiply(PlainMatrix<T>(in, LayerTensor::attention_out_weight, hidden, hidden), blockIdx.x,
           p.scratch + p.layout.attention, [&](std::int64_t row, float value) {
             static_cast<T*>(in.attn_output)[row] = static_cast<T>(value);
           });
}

// The layer's output: input, projected attention, and the MLP's second matrix.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads) add_halves(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const std::int64_t hidden = in.shape.hidden_size;
  // Both products give a row to the same lane.
  float attention = 0.0f;
  multiply(PlainMatrix<T>(in, LayerTensor::attention_out_weight, hidden, hidden), blockIdx.x,
           p.scratch + p.layout.attention, [&](std::int64_t, float value) { attention = value; });
  multiply(PlainMatrix<T>(in, LayerTensor::mlp_down_weight, hidden, in.shape.intermediate_size),
           blockIdx.x, p.scratch + p.layout.intermediate, [&](std::int64_t row, float value) {
             const float input = static_cast<float>(static_cast<const T*>(in.input)[row]);
             static_cast<T*>(in.output)[row] = static_cast<T>(input + attention + value);
           });
}

// The second half alone, on what the caller has.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    add_mlp_down(const __grid_constant__ LayerTask task) {
  device::start_dependents();
  device::wait_for_dependencies();
  const auto typed = [](const void* vector) { return static_cast<const T*>(vector); };
  multiply(PlainMatrix<T>(task, LayerTensor::mlp_down_weight, task.shape.hidden_size,
                          task.shape.intermediate_size),
           blockIdx.x, typed(task.mlp_intermediate), [&](std::int64_t row, float value) {
             const float sum = static_cast<float>(typed(task.input)[row]) +
                               static_cast<float>(typed(task.attn_output)[row]) + value;
             static_cast<T*>(task.output)[row] = static_cast<T>(sum);
           });
}

}  // namespace clusterfusion::cuda
