// What happens to each row of activations between the products of a prefill. A row is one token.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "backend/cuda/prefill/attention.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// What a row is, on the device; no kernel writes it.
struct alignas(16) PromptRow {
  std::int32_t token;
  std::int32_t position;    // in its sequence; -1: the row is padding, and goes nowhere
  std::int32_t first_page;  // of its sequence in PromptCache::pages
};

// x[count, hidden] = embedding[rows[count].token], as float32. `dtype` is the weights'.
void launch_embed(DType dtype, const PromptRow* rows, const void* embedding, float* x,
                  std::int64_t count, std::int64_t hidden, cudaStream_t stream);

// Weight and bias (or null) [hidden] in the weights' type, and where the normalised rows go, in
// that type.
struct NormOutput {
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* rows = nullptr;
};

// The widest row that one block normalises.
inline constexpr std::int64_t kMaxNormWidth = 8192;

struct NormParams {
  DType dtype;  // the weights'
  NormKind kind;
  float eps;
  const float* x;                      // [count, hidden], or those rows of it that `rows` names
  std::int64_t count, hidden;          // `hidden` is a multiple of 4
  const std::int32_t* rows = nullptr;  // [count], on the device, or null
};

// The norm of x: once or, if `second.rows` is there, with two sets of parameters.
void launch_norm(const NormParams& params, const NormOutput& first, const NormOutput& second,
                 cudaStream_t stream);

struct RotaryParams {
  const float* qkv;      // [count, LayerSpec::qkv_size()], biases included
  const float2* rotary;  // [positions, rotary_dim / 2]: cosine and sine
  std::int32_t rotary_dim;
  const PromptRow* rows;
  std::int32_t count;  // of rows
};

// Of LayerSpec::qk_norm: weights [head_dim] in the weights' type. Null: queries and keys have none.
struct HeadNorms {
  const void* query = nullptr;
  const void* key = nullptr;
  float eps = 0.0f;
};

// Normalises queries and keys, if there are norms, and rotates them; puts the queries into
// attention.query, keys and values into its cache, in the cache's type. `dtype` is the weights'.
void launch_rotary(DType dtype, const RotaryParams& rotary, const HeadNorms& norms,
                   const AttentionParams& attention, cudaStream_t stream);

struct RowScore {
  float target_logprob;              // of the row's target; 0 if it has none
  std::uint8_t all_finite;           // 1 if every logit of the row is a finite number
  std::uint8_t target_is_likeliest;  // 1 if no token is likelier, and none of a lower id as likely
};

// scores[row] of logits[count, vocab]; targets[row] is a token or -1.
void launch_score(const float* logits, const std::int32_t* targets, RowScore* scores,
                  std::int64_t count, std::int64_t vocab, cudaStream_t stream);

}  // namespace clusterfusion::cuda
