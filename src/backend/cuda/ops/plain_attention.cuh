// The plain layer kernels of attention, for any heads and caches: the rotation, which writes the
// new keys and values; attention over each split of a row's context; and what the splits give
// together.
#pragma once

#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/ops/plain_load.cuh"
#include "backend/cuda/ops/plain_params.hpp"
#include "backend/cuda/ops/plain_positions.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"

namespace clusterfusion::cuda {

// A head's query or key as its matrix gives it, and what an RMSNorm makes of it, if the layer has
// one. For whole warps.
template <typename T>
class ProjectedHead {
 public:
  __device__ __forceinline__ ProjectedHead(const PlainParams& p, const float* vector,
                                           LayerTensor norm)
      : vector_(vector), weight_(static_cast<const T*>(p.work.weight(norm))) {
    if (!p.work.spec.qk_norm) return;
    float squares = 0.0f;
    for (int dim = static_cast<int>(threadIdx.x) % 32; dim < p.shape.head_dim; dim += 32)
      squares = fmaf(vector[dim], vector[dim], squares);
    squares = device::warp_sum(squares);
    scale_ = rsqrtf(squares / static_cast<float>(p.shape.head_dim) + p.norm_eps);
  }

  __device__ __forceinline__ float at(int dim) const {
    if (weight_ == nullptr) return vector_[dim];
    return vector_[dim] * scale_ * static_cast<float>(weight_[dim]);
  }
  // After the rotation, in which each value meets its own cos and sin.
  __device__ __forceinline__ float rotated(int dim, int rotary_dim, const float* cos,
                                           const float* sin) const {
    if (dim >= rotary_dim) return at(dim);
    const int half = rotary_dim / 2;
    const float other = dim < half ? -at(dim + half) : at(dim - half);
    return at(dim) * cos[dim] + other * sin[dim];
  }

 private:
  const float* vector_;
  const T* weight_;
  float scale_ = 1.0f;
};

// Which of a row's heads a warp takes: those of queries first, then of keys, then of values.
struct HeadPlace {
  enum class Kind { query, key, value } kind;
  std::int64_t head;   // of its kind
  std::int64_t first;  // in Place::qkv: its first element
};

constexpr HeadPlace head_place(const PlainShape& shape, QkvLayout layout, std::int64_t index) {
  using enum HeadPlace::Kind;
  const std::int64_t kv_head =
      index < shape.heads ? index / shape.group : (index - shape.heads) % shape.kv_heads;
  const auto kind = index < shape.heads                    ? query
                    : index < shape.heads + shape.kv_heads ? key
                                                           : value;
  // Where they lie by KV head, behind its queries come its key and its value.
  const std::int64_t part = kind == query ? index % shape.group
                            : kind == key ? shape.group
                                          : shape.group + 1;
  const std::int64_t place =
      layout == QkvLayout::by_kv_head ? kv_head * (shape.group + 2) + part : index;
  return {kind, kind == query ? index : kv_head, place * shape.head_dim};
}

// A warp a head of one row: queries for attention, keys and values for the caches and the caller.
// A row without a position leaves the caches as they are.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    rotate_and_store_new(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  using enum HeadPlace::Kind;
  const LayerWork& in = p.work;
  const PlainShape& shape = p.shape;
  const std::int64_t row = blockIdx.y;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32;
  if (index >= shape.heads + 2 * shape.kv_heads) return;
  const auto [kind, head, first] = head_place(shape, in.spec.qkv_layout, index);
  const int position = checked_position(p, row);
  const float* const vector = p.scratch + p.layout.qkv + row * shape.qkv + first;
  const ProjectedHead<T> projected(
      p, vector, kind == query ? LayerTensor::query_norm_weight : LayerTensor::key_norm_weight);
  const float* const cos = in.cos + row * in.rotary_stride;
  const float* const sin = in.sin + row * in.rotary_stride;
  const auto rotary_dim = static_cast<int>(shape.rotary_dim);
  // Scores come out as base-2 logarithms.
  const float scale = rsqrtf(static_cast<float>(shape.head_dim)) * kLog2E;
  float* const queries = p.scratch + p.layout.query + (row * shape.heads + head) * shape.head_dim;
  T* const fresh = static_cast<T*>(kind == key ? in.k_new : in.v_new) +
                   (row * shape.kv_heads + head) * shape.head_dim;
  T* cached = static_cast<T*>(kind == key ? in.k_cache : in.v_cache) + head * in.cache.head_stride;
  if (position >= 0) cached += cache_offset(in, row, position);
  for (int dim = static_cast<int>(threadIdx.x) % 32; dim < shape.head_dim; dim += 32) {
    const float element =
        kind == value ? vector[dim] : projected.rotated(dim, rotary_dim, cos, sin);
    if (kind == query) {
      queries[dim] = element * scale;
      continue;
    }
    fresh[dim] = static_cast<T>(position >= 0 ? element : NAN);
    if (position >= 0) cached[dim] = static_cast<T>(element);
  }
}

// Lanes that share a key, and the keys of a tile that they score side by side.
inline constexpr int kLanesPerKey = 8;
inline constexpr int kKeysAtOnce = kPlainThreads / kLanesPerKey;
inline constexpr int kKeysPerLane = kTilePositions / kKeysAtOnce;
static_assert(kKeysAtOnce * kKeysPerLane == kTilePositions);

// By the first threads of a block: where a tile's positions lie in the caches. Behind the last of
// `count` that one comes again.
__device__ __forceinline__ void place_tile(const LayerWork& in, std::int64_t row, int first,
                                           int count, std::int64_t* offsets) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < kTilePositions) offsets[i] = cache_offset(in, row, first + min(i, count - 1));
}

// A tile's scores, by the whole block: `query` and the head's keys, which begin at `offsets`.
template <int kCount, typename T>
__device__ __forceinline__ void score_tile(const float* query, const T* keys, int head_dim,
                                           const std::int64_t* offsets, float* scores) {
  const int first = static_cast<int>(threadIdx.x) / kLanesPerKey;
  const int lane = static_cast<int>(threadIdx.x) % kLanesPerKey;
  const T* rows[kKeysPerLane];
  float sums[kKeysPerLane] = {};
#pragma unroll
  for (int j = 0; j < kKeysPerLane; ++j) rows[j] = keys + offsets[first + j * kKeysAtOnce];
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

// What a block has of its split, for combine_splits().
template <int kCount>
__device__ __forceinline__ void store_split(const PlainParams& p, int split,
                                            const ValueColumns<kCount>& columns,
                                            const float (&output)[kCount],
                                            const RunningSoftmax& softmax, float* gathered) {
  // [groups, columns of the slab]
#pragma unroll
  for (int k = 0; k < kCount; ++k) gathered[threadIdx.x * kCount + k] = output[k];
  __syncthreads();
  const std::int64_t partial = static_cast<std::int64_t>(blockIdx.x) * p.splits + split;
  const int width = columns.vectors * kCount;
  float* outputs = p.scratch + p.layout.outputs + partial * p.shape.head_dim + columns.first;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += kPlainThreads)
    outputs[i] = column_sum(gathered, columns.groups, width, i);
  if (threadIdx.x != 0 || blockIdx.z != 0) return;
  p.scratch[p.layout.maxima + partial] = softmax.maximum;
  p.scratch[p.layout.sums + partial] = softmax.sum;
}

// A split of a head of one row: block (row and head, split, slab of the head's values).
template <typename T, int kCount>
__global__ void __launch_bounds__(kPlainThreads)
    attend_split(const __grid_constant__ PlainParams p) {
  __shared__ std::int64_t places[2][kTilePositions];
  __shared__ float scores[kTilePositions];
  __shared__ float gathered[kPlainThreads * kCount];
  device::start_dependents();
  device::wait_for_dependencies();
  const LayerWork& in = p.work;
  const PlainShape& shape = p.shape;
  const std::int64_t row = blockIdx.x / shape.heads, head = blockIdx.x % shape.heads;
  const int position = checked_position(p, row);
  if (position < 0) return;
  const plan::AttentionSplits cut = plain_splits(shape, position + 1, p.sm_count);
  const int split = static_cast<int>(blockIdx.y);
  if (split >= cut.splits) return;
  const int split_positions = cut.blocks_per_split * kTilePositions;
  const int begin = split * split_positions;
  const int end = min(begin + split_positions, position + 1);
  const auto count_at = [&](int tile) { return min(kTilePositions, end - tile); };

  const int head_dim = static_cast<int>(shape.head_dim);
  const float* query = p.scratch + p.layout.query + blockIdx.x * shape.head_dim;
  const ValueColumns<kCount> columns(head_dim, static_cast<int>(blockIdx.z));
  const std::int64_t of_head = head / shape.group * in.cache.head_stride;
  const T* const keys = static_cast<const T*>(in.k_cache) + of_head;
  const T* const values = static_cast<const T*>(in.v_cache) + of_head + columns.column;
  RunningSoftmax softmax;
  float output[kCount] = {};
  const std::int64_t* offsets = places[0];
  place_tile(in, row, begin, count_at(begin), places[0]);
  __syncthreads();
  for (int tile = begin; tile < end; tile += kTilePositions) {
    const int count = count_at(tile);
    score_tile<kCount>(query, keys, head_dim, offsets, scores);
    std::int64_t* const next = offsets == places[0] ? places[1] : places[0];
    if (tile + kTilePositions < end)
      place_tile(in, row, tile + kTilePositions, count_at(tile + kTilePositions), next);
    __syncthreads();
    const float rescale = softmax.take(scores, count);
#pragma unroll
    for (int k = 0; k < kCount; ++k) output[k] *= rescale;
    if (columns.group < columns.groups) {
#pragma unroll 2
      for (int i = columns.group; i < count; i += columns.groups) {
        float elements[kCount];
        load(values + offsets[i], elements);
        const float weight = softmax.weight(scores[i]);
#pragma unroll
        for (int k = 0; k < kCount; ++k) output[k] = fmaf(weight, elements[k], output[k]);
      }
    }
    offsets = next;
    __syncthreads();
  }
  store_split(p, split, columns, output, softmax, gathered);
}

// A thread an element of all heads of one row. NaN for a row without a position: so is then all
// that is computed from it.
__global__ void __launch_bounds__(kPlainThreads)
    combine_splits(const __grid_constant__ PlainParams p) {
  device::start_dependents();
  device::wait_for_dependencies();
  const PlainShape& shape = p.shape;
  const std::int64_t row = blockIdx.y;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  if (i >= shape.attention) return;
  float* attention = p.scratch + p.layout.attention + row * shape.attention + i;
  const int position = checked_position(p, row);
  if (position < 0) {
    *attention = NAN;
    return;
  }
  const int splits = plain_splits(shape, position + 1, p.sm_count).splits;
  const std::int64_t first = (row * shape.heads + i / shape.head_dim) * p.splits;
  const float* maxima = p.scratch + p.layout.maxima + first;
  const float* sums = p.scratch + p.layout.sums + first;
  const float* outputs = p.scratch + p.layout.outputs + first * shape.head_dim + i % shape.head_dim;
  float maximum = -INFINITY;
  for (int split = 0; split < splits; ++split) maximum = fmaxf(maximum, maxima[split]);
  float sum = 0.0f, output = 0.0f;
  for (int split = 0; split < splits; ++split) {
    const float weight = exp2_approximately(maxima[split] - maximum);
    sum = fmaf(weight, sums[split], sum);
    output = fmaf(weight, outputs[split * shape.head_dim], output);
  }
  *attention = output / sum;
}

}  // namespace clusterfusion::cuda
