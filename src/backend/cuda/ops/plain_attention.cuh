// The plain layer kernels of attention, for any head size: the rotation, which writes the new key
// and value; attention over each split of the context; and what the splits give together.
#pragma once

#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ops/plain_load.cuh"
#include "backend/cuda/ops/plain_params.hpp"
#include "backend/cuda/ops/position.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"

namespace clusterfusion::cuda {

// Element `dim` of a head's query or key after the rotation: each value meets its own cos and sin.
__device__ __forceinline__ float rotated(const LayerTask& in, const float* vector, int dim) {
  const int rotary_dim = static_cast<int>(in.shape.rotary_dim);
  if (dim >= rotary_dim) return vector[dim];
  const int half = rotary_dim / 2;
  const float other = dim < half ? -vector[dim + half] : vector[dim - half];
  return vector[dim] * in.cos[dim] + other * in.sin[dim];
}

// A thread an element of all heads. A position that is not one leaves the caches as they are.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    rotate_and_store_new(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const int head_dim = static_cast<int>(in.shape.head_dim);
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= in.shape.hidden_size) return;
  const int position = position_of(in);
  if (!is_position(in.shape, position)) {
    static_cast<T*>(in.k_new)[i] = static_cast<T*>(in.v_new)[i] = static_cast<T>(NAN);
    return;
  }
  const std::int64_t head = i / head_dim;
  const int dim = static_cast<int>(i % head_dim);
  const float* query = p.scratch + p.layout.qkv + 3 * head * head_dim;
  const float* key = query + head_dim;
  const float* value = key + head_dim;
  // Scores come out as base-2 logarithms.
  const float scale = rsqrtf(static_cast<float>(head_dim)) * kLog2E;
  p.scratch[p.layout.query + i] = rotated(in, query, dim) * scale;
  const T new_key = static_cast<T>(rotated(in, key, dim));
  const T new_value = static_cast<T>(value[dim]);
  const std::int64_t cached = position * in.shape.hidden_size + i;
  static_cast<T*>(in.k_cache)[cached] = static_cast<T*>(in.k_new)[i] = new_key;
  static_cast<T*>(in.v_cache)[cached] = static_cast<T*>(in.v_new)[i] = new_value;
}

// Lanes that share a key, and the keys of a tile that they score side by side.
inline constexpr int kLanesPerKey = 8;
inline constexpr int kKeysAtOnce = kPlainThreads / kLanesPerKey;
inline constexpr int kKeysPerLane = kTilePositions / kKeysAtOnce;
static_assert(kKeysAtOnce * kKeysPerLane == kTilePositions);

// A tile's scores, by the whole block: `query` and the first column of the head's keys, in rows of
// `hidden`. Behind the last of `count` positions that one is scored again.
template <int kCount, typename T>
__device__ __forceinline__ void score_tile(const float* query, const T* keys, int head_dim,
                                           std::int64_t hidden, int count, float* scores) {
  const int first = static_cast<int>(threadIdx.x) / kLanesPerKey;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerKey;
  const T* rows[kKeysPerLane];
  float sums[kKeysPerLane] = {};
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j)
    rows[j] = keys + min(first + j * kKeysAtOnce, count - 1) * hidden;
#pragma unroll 2
  for (int dim = lane * kCount; dim < head_dim; dim += kLanesPerKey * kCount) {
    float elements[kCount], q[kCount];
    load(query + dim, q);
#pragma unroll
    for (int j = 0; j < kKeysPerLane; ++j) {
      load(rows[j] + dim, elements);
#pragma unroll
      for (int k = 0; k < kCount; ++k) sums[j] = fmaf(elements[k], q[k], sums[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) {
    const float score = device::warp_sum<kLanesPerKey>(sums[j]);
    if (lane == 0) scores[first + j * kKeysAtOnce] = score;
  }
}

// Of the scores so far, base-2 logarithms; the same in every thread.
struct RunningSoftmax {
  float maximum = -INFINITY;
  float sum = 0.0f;  // of weight()

  __device__ __forceinline__ float weight(float score) const {
    return exp2_approximately(score - maximum);
  }
  // Takes the first `count` scores of a tile. What was weighted before is to be multiplied by the
  // result.
  __device__ __forceinline__ float take(const float* scores, int count) {
    static_assert(kTilePositions == 2 * 32);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float one = lane < count ? scores[lane] : -INFINITY;
    const float other = lane + 32 < count ? scores[lane + 32] : -INFINITY;
    const float before = maximum;
    maximum = fmaxf(maximum, device::warp_max(fmaxf(one, other)));
    const float rescale = weight(before);
    sum = sum * rescale + device::warp_sum(weight(one) + weight(other));
    return rescale;
  }
};

// The columns of a head whose values a block weights: as many vectors of kCount as it has threads,
// or the head's last ones. The rest of the threads take other positions of a tile.
template <int kCount>
struct ValueColumns {
  __device__ __forceinline__ ValueColumns(int head_dim, int slab) {
    first = slab * kPlainThreads * kCount;
    vectors = min((head_dim - first) / kCount, kPlainThreads);
    groups = kPlainThreads / vectors;
    group = static_cast<int>(threadIdx.x) / vectors;
    column = first + static_cast<int>(threadIdx.x) % vectors * kCount;
  }

  int first, vectors, groups;
  int group;   // of this thread; threads of the last one may have none of the work
  int column;  // the first of this thread's
};

// The sum of one column of [rows, width], in the order of the rows.
__device__ __forceinline__ float column_sum(const float* matrix, int rows, int width, int column) {
  float sum = 0.0f;
  for (int row = 0; row < rows; ++row) sum += matrix[row * width + column];
  return sum;
}

// A split of a head: block (head, split, slab of the head's values).
template <typename T, int kCount>
__global__ void __launch_bounds__(kPlainThreads)
    attend_split(const __grid_constant__ PlainParams p) {
  __shared__ float scores[kTilePositions];
  __shared__ float gathered[kPlainThreads * kCount];
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const int position = position_of(in);
  if (!is_position(in.shape, position)) return;
  const plan::AttentionSplits cut = plain_splits(in.shape, position + 1, p.sm_count);
  const int split = static_cast<int>(blockIdx.y);
  if (split >= cut.splits) return;
  const int split_positions = cut.blocks_per_split * kTilePositions;
  const int begin = split * split_positions;
  const int end = min(begin + split_positions, position + 1);

  const int head_dim = static_cast<int>(in.shape.head_dim);
  const std::int64_t hidden = in.shape.hidden_size;
  const std::int64_t head_column = static_cast<std::int64_t>(blockIdx.x) * head_dim;
  const float* query = p.scratch + p.layout.query + head_column;
  const ValueColumns<kCount> columns(head_dim, static_cast<int>(blockIdx.z));
  RunningSoftmax softmax;
  float output[kCount] = {};
  for (int tile = begin; tile < end; tile += kTilePositions) {
    const int count = min(kTilePositions, end - tile);
    const std::int64_t first = tile * hidden + head_column;
    score_tile<kCount>(query, static_cast<const T*>(in.k_cache) + first, head_dim, hidden, count,
                       scores);
    __syncthreads();
    const float rescale = softmax.take(scores, count);
#pragma unroll
    for (int k = 0; k < kCount; ++k) output[k] *= rescale;
    const T* values = static_cast<const T*>(in.v_cache) + first + columns.column;
    if (columns.group < columns.groups) {
#pragma unroll 2
      for (int i = columns.group; i < count; i += columns.groups) {
        float elements[kCount];
        load(values + i * hidden, elements);
        const float weight = softmax.weight(scores[i]);
#pragma unroll
        for (int k = 0; k < kCount; ++k) output[k] = fmaf(weight, elements[k], output[k]);
      }
    }
    __syncthreads();
  }
  // [groups, columns of the slab]
#pragma unroll
  for (int k = 0; k < kCount; ++k) gathered[threadIdx.x * kCount + k] = output[k];
  __syncthreads();
  const std::int64_t partial = static_cast<std::int64_t>(blockIdx.x) * p.splits + split;
  const int width = columns.vectors * kCount;
  float* outputs = p.scratch + p.layout.outputs + partial * head_dim + columns.first;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kPlainThreads)
    outputs[i] = column_sum(gathered, columns.groups, width, i);
  if (threadIdx.x != 0 || blockIdx.z != 0) return;
  p.scratch[p.layout.maxima + partial] = softmax.maximum;
  p.scratch[p.layout.sums + partial] = softmax.sum;
}

// A thread an element of all heads. NaN for a position that is not one: so is then all that is
// computed from it.
__global__ void __launch_bounds__(kPlainThreads)
    combine_splits(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerTask& in = p.task;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= in.shape.hidden_size) return;
  float* attention = p.scratch + p.layout.attention + i;
  const int position = position_of(in);
  if (!is_position(in.shape, position)) {
    *attention = NAN;
    return;
  }
  const int splits = plain_splits(in.shape, position + 1, p.sm_count).splits;
  const std::int64_t head = i / in.shape.head_dim;
  const std::int64_t first = head * p.splits;
  const float* maxima = p.scratch + p.layout.maxima + first;
  const float* sums = p.scratch + p.layout.sums + first;
  const float* outputs =
      p.scratch + p.layout.outputs + first * in.shape.head_dim + i % in.shape.head_dim;
  float maximum = -INFINITY;
  for (int split = 0; split < splits; ++split) maximum = fmaxf(maximum, maxima[split]);
  float sum = 0.0f, output = 0.0f;
  for (int split = 0; split < splits; ++split) {
    const float weight = exp2_approximately(maxima[split] - maximum);
    sum = fmaf(weight, sums[split], sum);
    output = fmaf(weight, outputs[split * in.shape.head_dim], output);
  }
  *attention = output / sum;
}

}  // namespace clusterfusion::cuda
