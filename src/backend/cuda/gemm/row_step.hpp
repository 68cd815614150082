// What a step of many rows does between its products: see row_step.cu and attention_kernel.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/cuda/stream/row_tables.hpp"
#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda {

// What enters a LayerNorm, for all rows.
struct ResidualParams {
  // Inputs of a step, whose embeddings the residual stream begins with; null: it goes on.
  // tokens[row * token_stride] each.
  const std::int32_t* tokens;
  std::int32_t token_stride;
  // Pending updates: vectors of RowsLayout::residual, [first, last), of earlier products.
  std::int32_t first_pending, last_pending;
  // What it is normalised with, and where the result goes: bytes of the Lamport set. One or two.
  struct Norm {
    const void *weight, *bias;  // 16-bit [hidden]
    std::int32_t output;
  } norms[2];
  std::int32_t norm_count;
  float* residual;  // [rows, hidden]
  float* means;     // [rows], of the LayerNorms before
};

// The longest row that launch_residual() takes.
inline constexpr std::int64_t kMaxResidualSize = 6144;

// Adds pending updates to the residual stream of each row, and normalises it.
void launch_residual(DType dtype, const StreamParams& params, const ResidualParams& residual,
                     cudaStream_t stream);

// Each row's token, from its logits: chosen[row], -1 if a logit is not finite. `step` counts from
// the rows' positions.
void launch_choice(const StreamParams& params, const float* logits, std::int32_t step,
                   std::int32_t* chosen, cudaStream_t stream);

// Attention of one layer for all groups of rows, from RowsLayout::qkv to RowsLayout::attention, in
// product_input.
class RowsAttention {
 public:
  // Whether the build has a kernel for such heads.
  static bool supports(DType dtype, std::int64_t head_dim);

  // Errors: unsupported.
  RowsAttention(DType dtype, std::int64_t head_dim, std::int32_t sm_count);

  // No group has more than `splits` splits.
  void launch(const StreamParams& params, const plan::TaskExtent& extent, std::int32_t splits,
              std::int32_t layer, std::int32_t step, cudaStream_t stream) const;

 private:
  const void* attend_ = nullptr;
  const void* combine_ = nullptr;
  std::int32_t sm_count_;
};

}  // namespace clusterfusion::cuda
