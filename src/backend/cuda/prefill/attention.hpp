// Causal attention of many queries, each over the KV pages of its own sequence.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

inline constexpr int kAttentionThreads = 128;

// The cache of one layer, as plan::KvPlan lays it out.
struct PromptCache {
  char* const* pages;         // on the device: the pages of each 64 positions, of all sequences
  std::int64_t layer_offset;  // of this layer in a page, in bytes
  std::int32_t head_bytes;    // one page of one head
  std::int32_t block_bytes;   // keys and values of one block
  std::int32_t log2_block;    // positions in a block, as a power of two
  DType dtype;                // of keys and values: the weights', or float32
};

// Queries that follow each other in one sequence, which one block handles for a head.
struct alignas(16) QueryTile {
  std::int32_t row;         // of the first query
  std::int32_t count;       // of queries, up to AttentionKernel::query_rows; 0: none
  std::int32_t position;    // of the first query
  std::int32_t first_page;  // of its sequence in PromptCache::pages
};

struct AttentionParams {
  // [rows, heads * head_dim] in the cache's type: queries, rotated and scaled so that scores come
  // out as base-2 logarithms.
  void* query;
  void* heads;        // [rows, heads * head_dim], 16-bit: the heads' outputs; may be `query`
  PromptCache cache;  // keys and values of all positions up to the tiles' last
  // On the device, where a CUDA graph, whose launches are fixed, finds them anew each time; those
  // with most keys first. No kernel writes them.
  const QueryTile* tiles;
  std::int32_t num_tiles;
  std::int32_t num_heads, head_dim;
  std::int32_t heads_per_kv_head;  // query heads that share keys and values
};

// A kernel for one 16-bit type of the weights, for one type of the cache and for head sizes up to a
// limit.
struct AttentionKernel {
  const void* function = nullptr;
  std::int32_t query_rows = 0;  // that one block handles
  std::int32_t shared_bytes = 0;
};

// Head sizes are multiples of 16 up to 256. Errors: unsupported if there is no kernel, or what CUDA
// says of the shared memory that it needs.
AttentionKernel find_attention_kernel(DType weights_dtype, DType kv_dtype, std::int64_t head_dim);

void launch_attention(const AttentionKernel& kernel, const AttentionParams& params,
                      cudaStream_t stream);

}  // namespace clusterfusion::cuda
