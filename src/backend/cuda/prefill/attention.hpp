// Causal attention of many queries of one sequence over its KV pages.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

inline constexpr int kAttentionThreads = 128;

// The cache of one sequence and one layer, as plan::KvPlan lays it out.
struct PromptCache {
  char* const* pages;         // on the device: the page of each 64 positions
  std::int64_t layer_offset;  // of this layer in a page, in bytes
  std::int32_t head_bytes;    // one page of one head
  std::int32_t block_bytes;   // keys and values of one block
  std::int32_t log2_block;    // positions in a block, as a power of two
};

// What differs between prompts with the same number of rows. It lies on the device, where a CUDA
// graph, whose launches are fixed, finds it anew each time.
struct alignas(8) PromptExtent {
  std::int32_t count;  // of tokens; rows behind them are padding
  std::int32_t first_position;
};

struct AttentionParams {
  // [rows, heads * head_dim], 16-bit: queries, rotated and scaled so that scores come out as
  // base-2 logarithms; replaced by the heads' outputs.
  void* query;
  PromptCache cache;           // keys and values of all positions up to first_position + count
  const PromptExtent* extent;  // on the device
  std::int32_t rows;           // at least the extent's count
  std::int32_t num_heads, head_dim;
  std::int32_t heads_per_kv_head;  // query heads that share keys and values
};

// A kernel for one 16-bit type and for head sizes up to a limit.
struct AttentionKernel {
  const void* function = nullptr;
  std::int32_t query_rows = 0;  // that one block handles
  std::int32_t shared_bytes = 0;
};

// Head sizes are multiples of 16 up to 256. Errors: unsupported if there is no kernel, or what CUDA
// says of the shared memory that it needs.
AttentionKernel find_attention_kernel(DType dtype, std::int64_t head_dim);

void launch_attention(const AttentionKernel& kernel, const AttentionParams& params,
                      cudaStream_t stream);

}  // namespace clusterfusion::cuda
