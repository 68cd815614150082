// The KV cache as the engine keeps it, in pages, for the streaming decode kernel.
#pragma once

#include "backend/cuda/decode/shared.cuh"

namespace clusterfusion::cuda {

// Where the keys and values of a sequence lie, and the angles of its positions: pages, as the
// engine keeps them.
struct PagedCache {
  static constexpr bool kManyLayers = true;  // follow each other in a launch
  const DecodeParams& p;

  // Which of the grid's blocks this is, by which work is shared out.
  __device__ __forceinline__ int block_number() const { return static_cast<int>(blockIdx.x); }

  __device__ __forceinline__ char* block(int layer, int head, int block) const {
    const int first = block * p.kv_block_positions;
    const int block_in_page = first % plan::kKvPagePositions / p.kv_block_positions;
    return p.kv_pages[first / plan::kKvPagePositions] +
           static_cast<std::int64_t>(layer * p.num_kv_heads + head) * p.kv_head_bytes +
           static_cast<std::int64_t>(block_in_page) * p.kv_block_bytes;
  }

  // For the work scheduler: where the blocks of a task come from, one after the other. The page
  // table is in global memory, so this looks one block ahead.
  class Reader {
   public:
    __device__ __forceinline__ Reader(const PagedCache& cache, int layer, int head, int first,
                                      int end)
        : cache_(cache), layer_(layer), head_(head), end_(end) {
      next_ = cache.block(layer, head, first);
    }
    __device__ __forceinline__ std::uint64_t source(int block) {
      const char* source = next_;
      next_ = cache_.block(layer_, head_, min(block + 1, end_ - 1));
      return address_of(source);
    }

   private:
    const PagedCache& cache_;
    const char* next_;
    int layer_, head_, end_;
  };
  // For the producer: copies one of them.
  __device__ __forceinline__ void copy(const RingTask& task, const StageCopies& copies) const {
    copy_to_stage(task.target, pointer_to(task.order.source), task.order.bytes, copies);
  }

  // Cosine and sine for element `dim` (below rotary_dim) of a query or key.
  __device__ __forceinline__ float2 angle(int position, int dim) const {
    return __ldg(angles_from(position, dim));
  }
  // The same of four dimensions from `dim` on, two in each; multiples of four are rotated.
  __device__ __forceinline__ void angles(int position, int dim, float4 (&to)[2]) const {
    const auto* from = reinterpret_cast<const float4*>(angles_from(position, dim));
    to[0] = __ldg(from);
    to[1] = __ldg(from + 1);
  }
  __device__ __forceinline__ const float2* angles_from(int position, int dim) const {
    const int half = p.rotary_dim / 2;
    return p.rotary + static_cast<std::int64_t>(position) * half + (dim < half ? dim : dim - half);
  }

  template <typename T>
  __device__ __forceinline__ void store(int layer, int head, int position, int dim, T key,
                                        T value) const {
    T* keys = reinterpret_cast<T*>(block(layer, head, position / p.kv_block_positions)) +
              position % p.kv_block_positions * p.head_dim;
    keys[dim] = key;
    keys[p.kv_block_positions * p.head_dim + dim] = value;
  }
};

}  // namespace clusterfusion::cuda
