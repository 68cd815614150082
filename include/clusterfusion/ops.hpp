// One decoder layer, or a part of it, for one new token on the caller's own tensors.
//
// Unless LayerOptions say otherwise, the layer is GPT-NeoX's, with the parallel residual, as in
// Pythia:
//   output = input + attention(layer_norm(input)) + mlp(post_layer_norm(input))
//
// Tensors have the shapes below; further leading dimensions of 1 are allowed for what is one row.
// All are row-major and on one device. All but cos, sin and the position have one dtype, float16
// or bfloat16, and start at a multiple of 16 bytes. Sums, LayerNorm and softmax are float32.
// What is written (caches and results) must not overlap any other tensor.
//
// Errors, raised before anything runs, each with the argument's name, what was expected and what
// was found:
//   invalid_argument  shape, layout, alignment, device, overlap, a full cache, an option
//   wrong_type        dtype; a tensor that is not there
//   unsupported       a device that this build does not run on; on a GPU, caches of more than 2^30
//                     positions for a shape that is not streamed, and options marked "CPU"
//
// They run where the tensors are: on the CPU, or on a GPU of compute capability 9.0 or 12.0. There
// they only enqueue work on `stream`; docs/layer-calls.md says what holds for streams and captures.
// May be called from several threads.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <optional>

#include "clusterfusion/model.hpp"

namespace clusterfusion::ops {

// How many positions the caches hold, which is also the new token's position: a number, or an int32
// tensor of one element on the device of the others. A tensor on a GPU is read when the work runs
// and cannot be checked: outside [0, max_seq_len) all results are NaN, and the caches stay as they
// are.
struct Position {
  std::int64_t value = 0;
  DLTensor tensor{};  // used if its `data` is not null
};

struct LayerOptions {
  std::int64_t num_heads = 0;  // divides hidden
  // Heads of keys and values, each shared by as many query heads: divides num_heads. Nothing: as
  // many as num_heads. Fewer: CPU.
  std::optional<std::int64_t> num_kv_heads;
  // Rows of weight_qkv and bias_qkv: for each head of keys and values its queries, its key and its
  // value; or else all queries, then all keys, then all values (CPU).
  bool qkv_weight_interleaved = true;
  // Values of a head that are rotated: even, 0 to head_dim. Nothing: as many as cos and sin have,
  // which must then be fewer than head_dim.
  std::optional<std::int64_t> rotary_dim;
  double layer_norm_eps = 1e-5;
  Activation activation = Activation::gelu_erf;
};

// Sizes that the tensors must have; 0: whatever they have.
struct ExpectedSizes {
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
};

// What attention and the first half of the MLP read and write. max_seq_len is the caches' first
// dimension, head_dim is hidden / num_heads, kv_size is num_kv_heads head_dim: without grouped
// heads it is hidden.
struct LayerTensors {
  DLTensor input{};           // [1, hidden]
  DLTensor weight_qkv{};      // [hidden + 2 kv_size, hidden]: see qkv_weight_interleaved
  DLTensor bias_qkv{};        // [hidden + 2 kv_size]; may be absent (null data)
  DLTensor weight_o{};        // [hidden, hidden]
  DLTensor bias_o{};          // [hidden]; may be absent
  DLTensor k_cache{};         // [max_seq_len, kv_size]: keys after RoPE; the new row is written
  DLTensor v_cache{};         // [max_seq_len, kv_size]: the new row is written
  DLTensor ln_weight{};       // [hidden]
  DLTensor ln_bias{};         // [hidden]
  DLTensor cos{};             // float32 [rotary_dim], or [head_dim] with 1 past rotary_dim
  DLTensor sin{};             // float32, as cos, with 0 past rotary_dim
  DLTensor post_ln_weight{};  // [hidden]
  DLTensor post_ln_bias{};    // [hidden]
  DLTensor mlp_up_weight{};   // [intermediate, hidden]
  DLTensor mlp_up_bias{};     // [intermediate]
  Position current_seq_len;
};

struct AttentionMlpUpResults {
  DLTensor attn_output{};       // [1, hidden]: with bias, without residual
  DLTensor mlp_intermediate{};  // [intermediate]: after the activation
  DLTensor k_new{};             // [1, num_kv_heads, head_dim]: after RoPE
  DLTensor v_new{};             // [1, num_kv_heads, head_dim]
};

struct MlpDownTensors {
  DLTensor hidden_states{};     // [1, hidden]: the layer's input
  DLTensor attn_output{};       // [1, hidden]
  DLTensor mlp_intermediate{};  // [intermediate]
  DLTensor mlp_down_weight{};   // [hidden, intermediate]
  DLTensor mlp_down_bias{};     // [hidden]
};

struct DecoderLayerResults {
  DLTensor output{};  // [1, hidden]
  DLTensor k_new{};   // [1, num_kv_heads, head_dim]: after RoPE
  DLTensor v_new{};   // [1, num_kv_heads, head_dim]
};

// `stream`: a cudaStream_t; null is the default stream. Without meaning on the CPU.
void attention_mlp_up(const LayerTensors& tensors, const LayerOptions& options,
                      const AttentionMlpUpResults& results, void* stream = nullptr,
                      const ExpectedSizes& expected = {});

// output [1, hidden] = hidden_states + attn_output + MLP-down of mlp_intermediate.
void mlp_down(const MlpDownTensors& tensors, const DLTensor& output, void* stream = nullptr,
              const ExpectedSizes& expected = {});

enum class DecoderLayerVariant {
  fused,  // one kernel, where the shape is one that can be streamed
  split,  // two then, one for each half of the layer; the same as fused for other shapes
};

void decoder_layer(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                   const DLTensor& mlp_down_bias, const LayerOptions& options,
                   const DecoderLayerResults& results,
                   DecoderLayerVariant variant = DecoderLayerVariant::fused, void* stream = nullptr,
                   const ExpectedSizes& expected = {});

}  // namespace clusterfusion::ops
