// The plain layer kernels of matrices: the two norms, and rows of 16-bit weights times vectors, one
// for each row of the call. Each warp computes its rows whole, in an order that does not depend on
// how many vectors there are, and reads them once for all.
#pragma once

#include "backend/cuda/numeric/activation.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ops/plain_load.cuh"
#include "backend/cuda/ops/plain_params.hpp"
#include "backend/cuda/ops/plain_positions.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"

namespace clusterfusion::cuda {

// What a norm takes: the layer's input, and where the MLP follows attention, what that adds.
template <typename T>
struct NormInput {
  const T* input;          // [hidden]
  const float* attention;  // [hidden], or null

  template <int kCount>
  __device__ __forceinline__ void load(std::int64_t i, float (&to)[kCount]) const {
    cuda::load(input + i, to);
    if (attention == nullptr) return;
    float added[kCount];
    cuda::load(attention + i, added);
#pragma unroll
    for (int k = 0; k < kCount; ++k) to[k] += added[k];
  }
};

// Sum of value(element) over the `count` elements of x, by each warp for itself.
template <int kCount, typename T, typename Value>
__device__ __forceinline__ float warp_sum_over(const NormInput<T>& x, std::int64_t count,
                                               Value&& value) {
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t i = threadIdx.x % 32 * kCount; i < count; i += 32 * kCount) {
    float elements[kCount];
    x.load(i, elements);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += value(elements[k]);
  }
  return device::warp_sum(sum);
}

struct RowMoments {
  float mean, inverse_deviation;
};

// Mean first, then the squares around it: safe for any mean. An RMSNorm takes them around 0.
template <int kCount, typename T>
__device__ __forceinline__ RowMoments moments_of(const NormInput<T>& x, std::int64_t count,
                                                 NormKind kind, float eps) {
  const auto n = static_cast<float>(count);
  const float mean = kind == NormKind::rms_norm
                         ? 0.0f
                         : warp_sum_over<kCount>(x, count, [](float value) { return value; }) / n;
  const float squares = warp_sum_over<kCount>(
      x, count, [mean](float value) { return (value - mean) * (value - mean); });
  return {mean, rsqrtf(squares / n + eps)};
}

// A thread an element of one row's result, or of both. Each warp takes the moments of the whole
// input, which lies in L1 soon: nobody waits for another.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    normalise(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerWork& in = p.work;
  const std::int64_t row = blockIdx.y;
  if (p.of_attention && blockIdx.x == 0) publish_position(p, row);
  const std::int64_t hidden = p.shape.hidden;
  const float* attention = p.of_attention ? nullptr : p.scratch + p.layout.projected + row * hidden;
  const NormInput<T> x{static_cast<const T*>(in.input) + row * hidden, attention};
  const RowMoments moments = hidden % kVectorElements == 0
                                 ? moments_of<kVectorElements>(x, hidden, in.spec.norm, p.norm_eps)
                                 : moments_of<1>(x, hidden, in.spec.norm, p.norm_eps);
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= hidden) return;
  float element[1];
  x.load(i, element);
  const float value = (element[0] - moments.mean) * moments.inverse_deviation;
  const auto scaled = [&](LayerTensor weight) {
    const auto* bias = static_cast<const T*>(in.weight(bias_of(weight)));
    return fmaf(value, static_cast<float>(static_cast<const T*>(in.weight(weight))[i]),
                bias == nullptr ? 0.0f : static_cast<float>(bias[i]));
  };
  float* const results = p.scratch + row * hidden + i;
  if (p.of_attention) results[p.layout.normed] = scaled(LayerTensor::input_norm_weight);
  if (p.of_mlp) results[p.layout.post_normed] = scaled(LayerTensor::post_norm_weight);
}

// Row-major [rows, columns] weights; `bias` [rows] or null.
template <typename T>
struct PlainMatrix {
  __device__ __forceinline__ PlainMatrix(const LayerWork& work, LayerTensor weight,
                                         std::int64_t its_rows, std::int64_t its_columns)
      : weights(static_cast<const T*>(work.weight(weight))),
        bias(static_cast<const T*>(work.weight(bias_of(weight)))),
        rows(its_rows),
        columns(its_columns) {}

  const T* weights;
  const T* bias;
  std::int64_t rows, columns;
};

// Adds to `sums` this lane's share of the rows from `first` on times the vectors of x [tokens,
// columns]. Behind the last row, and the last token, that one comes again.
template <int kTokens, int kCount, typename T, typename X>
__device__ __forceinline__ void add_products(const PlainMatrix<T>& matrix, std::int64_t first,
                                             const X* x, int tokens,
                                             float (&sums)[kRowsPerWarp][kTokens]) {
  const T* rows[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r)
    rows[r] = matrix.weights + min(first + r, matrix.rows - 1) * matrix.columns;
#pragma unroll(kTokens == 1 ? 2 : 1)
  for (std::int64_t i = threadIdx.x % 32 * kCount; i < matrix.columns; i += 32 * kCount) {
    float weights[kRowsPerWarp][kCount];
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) load(rows[r] + i, weights[r]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int token = kTokens == 1 ? 0 : min(t, tokens - 1);
      float values[kCount];
      load(x + token * matrix.columns + i, values);
#pragma unroll
      for (int k = 0; k < kCount; ++k)
#pragma unroll
        for (int r = 0; r < kRowsPerWarp; ++r)
          sums[r][t] = fmaf(weights[r][k], values[k], sums[r][t]);
    }
  }
}

// Calls store(token, row, sum with bias) for each of this warp's rows of block `block` and each
// token, in one lane each: always the same one for a token and the place of a row in its block.
template <int kTokens, typename T, typename X, typename Store>
__device__ __forceinline__ void multiply(const PlainMatrix<T>& matrix, std::int64_t block,
                                         const X* x, int tokens, Store&& store) {
  static_assert(kRowsPerWarp * kTokens <= 32);
  const std::int64_t first = block * kRowsPerBlock + threadIdx.x / 32 * kRowsPerWarp;
  if (first >= matrix.rows) return;
  float sums[kRowsPerWarp][kTokens] = {};
  if (matrix.columns % kVectorElements == 0)
    add_products<kTokens, kVectorElements>(matrix, first, x, tokens, sums);
  else
    add_products<kTokens, 1>(matrix, first, x, tokens, sums);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float own = 0.0f;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r)
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const float sum = device::warp_sum(sums[r][t]);
      if (lane == r * kTokens + t) own = sum;
    }
  const int token = lane % kTokens;
  const std::int64_t row = first + lane / kTokens;
  if (lane >= kRowsPerWarp * kTokens || row >= matrix.rows || token >= tokens) return;
  store(token, row, matrix.bias == nullptr ? own : own + static_cast<float>(matrix.bias[row]));
}

// Blocks that multiply() wants for a matrix.
constexpr std::int64_t blocks_of_rows(std::int64_t rows) {
  return (rows + kRowsPerBlock - 1) / kRowsPerBlock;
}

// One of the matrices that give queries, keys and values: its tensor and rows, the first of its
// results among all, and which of its blocks this is.
struct QkvPart {
  LayerTensor weight;
  std::int64_t rows, first, block;
};

// The blocks of all of them, and the part that one of them belongs to.
constexpr std::int64_t qkv_blocks(const PlainShape& shape, QkvLayout layout) {
  if (layout == QkvLayout::by_kv_head) return blocks_of_rows(shape.qkv);
  return blocks_of_rows(shape.attention) + 2 * blocks_of_rows(shape.kv);
}
constexpr QkvPart qkv_part(const PlainShape& shape, QkvLayout layout, std::int64_t block) {
  if (layout == QkvLayout::by_kv_head) return {LayerTensor::qkv_weight, shape.qkv, 0, block};
  const std::int64_t query_blocks = blocks_of_rows(shape.attention);
  const std::int64_t key_blocks = blocks_of_rows(shape.kv);
  if (block < query_blocks) return {LayerTensor::query_weight, shape.attention, 0, block};
  block -= query_blocks;
  if (block < key_blocks) return {LayerTensor::key_weight, shape.kv, shape.attention, block};
  block -= key_blocks;
  return {LayerTensor::value_weight, shape.kv, shape.attention + shape.kv, block};
}

template <int kTokens, typename T>
__device__ __forceinline__ void multiply_qkv(const PlainParams& p, std::int64_t block) {
  const PlainShape& shape = p.shape;
  const QkvPart part = qkv_part(shape, p.work.spec.qkv_layout, block);
  float* const qkv = p.scratch + p.layout.qkv + part.first;
  multiply<kTokens>(
      PlainMatrix<T>(p.work, part.weight, part.rows, shape.hidden), part.block,
      p.scratch + p.layout.normed, static_cast<int>(p.work.rows),
      [&](int token, std::int64_t row, float value) { qkv[token * shape.qkv + row] = value; });
}

// The MLP's activations are a result, or for the second half. Those of a row without a position
// are NaN, whatever the activation makes of NaN.
template <int kTokens, typename T>
__device__ __forceinline__ void multiply_up(const PlainParams& p, std::int64_t block) {
  const LayerWork& in = p.work;
  const PlainShape& shape = p.shape;
  const float* const x = p.scratch + p.layout.post_normed;
  const int tokens = static_cast<int>(in.rows);
  const bool gated = in.spec.gated_mlp;
  // Both products give a row to the same lane.
  float gate = 1.0f;
  if (gated) {
    multiply<kTokens>(
        PlainMatrix<T>(in, LayerTensor::mlp_gate_weight, shape.intermediate, shape.hidden), block,
        x, tokens,
        [&](int, std::int64_t, float value) { gate = activate(in.spec.activation, value); });
  }
  multiply<kTokens>(
      PlainMatrix<T>(in, LayerTensor::mlp_up_weight, shape.intermediate, shape.hidden), block, x,
      tokens, [&](int token, std::int64_t row, float value) {
        float result = gated ? gate * value : activate(in.spec.activation, value);
        if (checked_position(p, token) < 0) result = NAN;
        const std::int64_t i = token * shape.intermediate + row;
        if (in.mlp_intermediate == nullptr)
          p.scratch[p.layout.intermediate + i] = result;
        else
          static_cast<T*>(in.mlp_intermediate)[i] = static_cast<T>(result);
      });
}

// The blocks of queries, keys and values, if they are asked for, and behind them those of the MLP's
// first matrix.
template <int kTokens, typename T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    multiply_normed(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const std::int64_t of_attention =
      p.of_attention ? qkv_blocks(p.shape, p.work.spec.qkv_layout) : 0;
  if (blockIdx.x < of_attention)
    multiply_qkv<kTokens, T>(p, blockIdx.x);
  else
    multiply_up<kTokens, T>(p, blockIdx.x - of_attention);
}

template <int kTokens, typename T, typename Store>
__device__ __forceinline__ void multiply_attention(const PlainParams& p, Store&& store) {
  const PlainMatrix<T> matrix(p.work, LayerTensor::attention_out_weight, p.shape.hidden,
                              p.shape.attention);
  multiply<kTokens>(matrix, blockIdx.x, p.scratch + p.layout.attention,
                    static_cast<int>(p.work.rows), store);
}

// Attention's output as a result, and for the MLP that follows it.
template <int kTokens, typename T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    project_attention(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerWork& in = p.work;
  multiply_attention<kTokens, T>(p, [&](int token, std::int64_t row, float value) {
    const std::int64_t i = token * p.shape.hidden + row;
    if (!in.spec.parallel_residual) p.scratch[p.layout.projected + i] = value;
    if (in.attn_output != nullptr) static_cast<T*>(in.attn_output)[i] = static_cast<T>(value);
  });
}

// Calls store(token, row, value) with what the MLP's second matrix gives, of its activations
// [tokens, intermediate].
template <int kTokens, typename T, typename X, typename Store>
__device__ __forceinline__ void multiply_down(const PlainParams& p, const X* activations,
                                              Store&& store) {
  const PlainMatrix<T> matrix(p.work, LayerTensor::mlp_down_weight, p.shape.hidden,
                              p.shape.intermediate);
  multiply<kTokens>(matrix, blockIdx.x, activations, static_cast<int>(p.work.rows), store);
}

// The layer's output: input, projected attention, and the MLP's second matrix. Where the MLP
// follows attention, that is projected already.
template <int kTokens, typename T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    add_halves(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerWork& in = p.work;
  const bool parallel = in.spec.parallel_residual;
  // Both products give a row to the same lane.
  float attention = 0.0f;
  if (parallel)
    multiply_attention<kTokens, T>(p, [&](int, std::int64_t, float value) { attention = value; });
  multiply_down<kTokens, T>(
      p, p.scratch + p.layout.intermediate, [&](int token, std::int64_t row, float value) {
        const std::int64_t i = token * p.shape.hidden + row;
        if (!parallel) attention = p.scratch[p.layout.projected + i];
        const float input = static_cast<float>(static_cast<const T*>(in.input)[i]);
        static_cast<T*>(in.output)[i] = static_cast<T>(input + attention + value);
      });
}

// The second half alone, on what the caller has.
template <int kTokens, typename T>
__global__ void __launch_bounds__(kPlainThreads, 1)
    add_mlp_down(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerWork& in = p.work;
  const auto typed = [](const void* vector) { return static_cast<const T*>(vector); };
  multiply_down<kTokens, T>(
      p, typed(in.mlp_intermediate), [&](int token, std::int64_t row, float value) {
        const std::int64_t i = token * p.shape.hidden + row;
        const float sum = static_cast<float>(typed(in.input)[i]) +
                          static_cast<float>(typed(in.attn_output)[i]) + value;
        static_cast<T*>(in.output)[i] = static_cast<T>(sum);
      });
}

}  // namespace clusterfusion::cuda
