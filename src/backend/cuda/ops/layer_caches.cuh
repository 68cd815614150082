// The caller's caches, for the streaming layer kernel: in rows of all heads, or in pages.
#pragma once

#include "backend/cuda/decode/shared.cuh"
#include "backend/cuda/ops/layer_params.hpp"
#include "backend/cuda/ops/position.cuh"
#include "backend/cuda/ptx/tensor_copy.cuh"

namespace clusterfusion::cuda {

// What both have in common.
struct LayerCache {
  static constexpr bool kManyLayers = false;
  const LayerParams& p;
  SharedControl* control;

  __device__ __forceinline__ int block_number() const { return control->block_number; }

  __device__ __forceinline__ float2 angle(int, int dim) const {
    return make_float2(__ldg(p.cosines + dim), __ldg(p.sines + dim));
  }

  // Without bulk copies, what a box of the maps is: `rows` rows of a head, zeros from row `valid`
  // on. The first one's is element `first` of the cache, the next `stride` elements behind. By all
  // who produce.
  __device__ __forceinline__ void copy_rows(std::uint32_t target, const void* cache,
                                            std::int64_t first, std::int64_t stride, int rows,
                                            int valid) const {
    const int row_units = p.stream.head_dim / 8;  // of 16 bytes
    const auto* source = static_cast<const char*>(cache) + first * 2;
    for (int unit = static_cast<int>(threadIdx.x) % kProducerLanes; unit < rows * row_units;
         unit += kProducerLanes) {
      const int row = unit / row_units;
      copy_16_or_zero(target + unit * 16, source + row * stride * 2 + unit % row_units * 16,
                      row < valid);
    }
  }

  // Element `element` of the caches and `column` of the new key and value.
  template <typename T>
  __device__ __forceinline__ void store_at(std::int64_t element, int column, T key, T value) const {
    static_cast<T*>(p.k_cache)[element] = key;
    static_cast<T*>(p.v_cache)[element] = value;
    static_cast<T*>(p.k_new)[column] = key;
    static_cast<T*>(p.v_new)[column] = value;
  }
};

// Keys and values in rows of all heads.
struct RowCache : LayerCache {
  static constexpr bool kInPages = false;

  // Whether there is such a row.
  __device__ __forceinline__ bool is_inside(int position) const { return is_position(p, position); }
  __device__ __forceinline__ void find_row(int, int) const {}

  class Reader {
   public:
    __device__ __forceinline__ Reader(const RowCache& cache, int, int head, int, int)
        : positions_(cache.p.stream.kv_block_positions), column_(head * cache.p.stream.head_dim) {}
    // The place of a block in the tensors: column, and row in the upper half.
    __device__ __forceinline__ std::uint64_t source(int block) const {
      return static_cast<std::uint64_t>(block * positions_) << 32 | column_;
    }

   private:
    int positions_;
    std::uint32_t column_;
  };
  __device__ __forceinline__ void copy(const RingTask& task, const StageCopies& copies) const {
    const int column = static_cast<int>(task.order.source);
    const int row = static_cast<int>(task.order.source >> 32);
    const std::uint32_t values = task.target + task.order.bytes / 2;
    if constexpr (kBulkCopies) {
      tensor_copy_to_shared(task.target, p.key_map, column, row, copies.barrier);
      tensor_copy_to_shared(values, p.value_map, column, row, copies.barrier);
    } else {
      const std::int64_t stride = p.stream.hidden_size, first = row * stride + column;
      const int rows = p.stream.kv_block_positions, valid = p.max_positions - row;
      copy_rows(task.target, p.k_cache, first, stride, rows, valid);
      copy_rows(values, p.v_cache, first, stride, rows, valid);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(int, int head, int position, int dim, T key,
                                        T value) const {
    const int column = head * p.stream.head_dim + dim;
    store_at(static_cast<std::int64_t>(position) * p.stream.hidden_size + column, column, key,
             value);
  }
};

// Keys and values in pages, which a table names. A block of the ring is put together from as many
// boxes as it has pages.
struct PageCache : LayerCache {
  static constexpr bool kInPages = true;

  // By one warp of each block: tells the others whether there is such a position, and whether all
  // pages up to it are the cache's. The entries are in L1 then, for those who read them later.
  __device__ __forceinline__ void find_row(int position, int lane) const {
    bool outside = !is_position(p, position);
    if (!outside) {
#pragma unroll 8
      for (int i = lane; i <= position >> p.pages.size_log2; i += 32)
        outside |= static_cast<unsigned>(page_at(i)) >= static_cast<unsigned>(p.pages.count);
    }
    outside = __any_sync(kAllLanes, outside);
    if (lane == 0) {
      control->row_position = outside ? -1 : position;
      block_counter_store(&control->row_found, 1);
    }
    __syncwarp();
  }
  __device__ __forceinline__ bool is_inside(int) const {
    block_counter_wait(&control->row_found, 1);
    return control->row_position >= 0;
  }

  class Reader {
   public:
    __device__ __forceinline__ Reader(const PageCache&, int, int head, int, int)
        : head_(static_cast<std::uint32_t>(head)) {}
    // The head, and the block in the upper half: the producer looks into the table.
    __device__ __forceinline__ std::uint64_t source(int block) const {
      return static_cast<std::uint64_t>(block) << 32 | head_;
    }

   private:
    std::uint32_t head_;
  };
  // By who has seen the announcement of somebody who has seen is_inside().
  __device__ __forceinline__ void copy(const RingTask& task, const StageCopies& copies) const {
    const auto head = static_cast<int>(task.order.source);
    const auto block = static_cast<int>(task.order.source >> 32);
    const int first = block * p.stream.kv_block_positions;
    const int box = p.pages.box_positions;
    const int last = control->row_position;
    std::uint32_t keys = task.target, values = task.target + task.order.bytes / 2;
    for (int i = 0; i < p.stream.kv_block_positions; i += box) {
      const int position = first + i;
      // Nobody looks at what the table has behind the last position. A page outside is zeros.
      const int page = position > last ? p.pages.count : page_at(position >> p.pages.size_log2);
      const int in_page = position & ((1 << p.pages.size_log2) - 1);
      if constexpr (kBulkCopies) {
        const int4 at = make_int4(0, head, in_page, page);
        tensor_copy_to_shared(keys, p.key_map, at, copies.barrier);
        tensor_copy_to_shared(values, p.value_map, at, copies.barrier);
      } else {
        const std::int64_t first = element_at(page, in_page, head);
        const int valid = page == p.pages.count ? 0 : box;
        copy_rows(keys, p.k_cache, first, p.pages.position_stride, box, valid);
        copy_rows(values, p.v_cache, first, p.pages.position_stride, box, valid);
      }
      keys += box * p.stream.head_dim * 2;
      values += box * p.stream.head_dim * 2;
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(int, int head, int position, int dim, T key,
                                        T value) const {
    const int in_page = position & ((1 << p.pages.size_log2) - 1);
    const std::int64_t first = element_at(page_at(position >> p.pages.size_log2), in_page, head);
    store_at(first + dim, head * p.stream.head_dim + dim, key, value);
  }

 private:
  // The first of a head's elements at a position of a page.
  __device__ __forceinline__ std::int64_t element_at(int page, int in_page, int head) const {
    return page * p.pages.page_stride + in_page * p.pages.position_stride +
           head * p.pages.head_stride;
  }
  // Entry `index` of the table, which nobody writes while the kernel runs.
  __device__ __forceinline__ int page_at(int index) const { return __ldg(p.pages.table + index); }
};

}  // namespace clusterfusion::cuda
