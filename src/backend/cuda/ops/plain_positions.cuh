// Where each row's new token goes, and where its keys and values lie, for the plain layer kernels.
#pragma once

#include <cstdint>

#include "backend/cuda/ops/plain_params.hpp"

namespace clusterfusion::cuda {

// The position of a row's new token, or -1 if there is no such place: what publish_position() has
// left, for the kernels behind it.
__device__ __forceinline__ int checked_position(const PlainParams& p, std::int64_t row) {
  return reinterpret_cast<const std::int32_t*>(p.scratch + p.layout.positions)[row];
}

// By a whole block: finds it. Positions and tables on the device have been checked by nobody.
__device__ __forceinline__ void publish_position(const PlainParams& p, std::int64_t row) {
  const LayerWork& in = p.work;
  const int position = in.positions == nullptr ? static_cast<int>(in.position) : in.positions[row];
  const auto page_size = static_cast<int>(in.cache.page_size);
  bool outside = position < 0 || position >= in.max_pages * in.cache.page_size;
  if (!outside && in.block_table != nullptr) {
    const std::int32_t* const table = in.block_table + row * in.block_table_stride;
    for (int i = static_cast<int>(threadIdx.x); i <= position / page_size; i += kPlainThreads)
      outside |= table[i] < 0 || table[i] >= in.cache.pages;
  }
  outside = __syncthreads_or(outside);
  if (threadIdx.x != 0) return;
  auto* const positions = reinterpret_cast<std::int32_t*>(p.scratch + p.layout.positions);
  positions[row] = outside ? -1 : position;
}

// Of the first head's key, or value, at a position of a row: elements from the cache's beginning.
__device__ __forceinline__ std::int64_t cache_offset(const LayerWork& in, std::int64_t row,
                                                     int position) {
  const CacheLayout& cache = in.cache;
  if (in.block_table == nullptr) return position * cache.position_stride;
  const auto page_size = static_cast<int>(cache.page_size);
  const std::int64_t page = in.block_table[row * in.block_table_stride + position / page_size];
  return page * cache.page_stride + position % page_size * cache.position_stride;
}

}  // namespace clusterfusion::cuda
