// One decoder layer, or a part of it, for one new token on the caller's own tensors.
//
// Unless LayerOptions say otherwise, the layer is GPT-NeoX's, with the parallel residual, as in
// Pythia:
//   output = input + attention(layer_norm(input)) + mlp(post_layer_norm(input))
// Options make it one of Llama's, Mistral's or Qwen's.
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
//                     positions for a layer that is not streamed
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
// are. With a block table a number is that of all rows, and a tensor has one for each; those in a
// tensor are never checked, on any device: see LayerTensors::block_table.
struct Position {
  std::int64_t value = 0;
  DLTensor tensor{};                     // used unless it is absent
  const char* name = "current_seq_len";  // in messages
};

struct LayerOptions {
  std::int64_t num_heads = 0;  // divides hidden
  // Nothing: hidden / num_heads. Another, for which num_heads need not divide hidden.
  std::optional<std::int64_t> head_dim;
  // Heads of keys and values, each shared by as many query heads: divides num_heads. Nothing: as
  // many as num_heads.
  std::optional<std::int64_t> num_kv_heads;
  // Rows of weight_qkv and bias_qkv: for each head of keys and values its queries, its key and its
  // value; or else all queries, then all keys, then all values.
  bool qkv_weight_interleaved = true;
  // Values of a head that are rotated: even, 0 to head_dim. Nothing: as many as cos and sin have,
  // which must then be fewer than head_dim.
  std::optional<std::int64_t> rotary_dim;
  double layer_norm_eps = 1e-5;  // of either kind of norm
  Activation activation = Activation::gelu_erf;
  NormKind norm = NormKind::layer_norm;  // or RMSNorm, which has no biases
  // The MLP's first matrix is that of the gate and behind it that of the values: the second
  // half takes activation(gate) value.
  bool gated = false;
  // False: the MLP's norm takes input + attention, instead of input.
  bool parallel_residual = true;
};

// Sizes that the tensors must have; 0: whatever they have.
struct ExpectedSizes {
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
};

// What attention and the first half of the MLP read and write. max_seq_len is the caches' first
// dimension, q_size is num_heads head_dim and kv_size is num_kv_heads head_dim: both are hidden
// unless options say otherwise. Absent tensors have null data and no
// dimension of 0.
struct LayerTensors {
  DLTensor input{};           // [1, hidden]
  DLTensor weight_qkv{};      // [q_size + 2 kv_size, hidden]: see qkv_weight_interleaved
  DLTensor bias_qkv{};        // [q_size + 2 kv_size]; may be absent
  DLTensor weight_o{};        // [hidden, q_size]
  DLTensor bias_o{};          // [hidden]; may be absent
  DLTensor k_cache{};         // [max_seq_len, kv_size]: keys after RoPE; the new row is written
  DLTensor v_cache{};         // [max_seq_len, kv_size]: the new row is written
  DLTensor ln_weight{};       // [hidden]
  DLTensor ln_bias{};         // [hidden]; absent with an RMSNorm
  DLTensor cos{};             // float32 [rotary_dim], or [head_dim] with 1 past rotary_dim
  DLTensor sin{};             // float32, as cos, with 0 past rotary_dim
  DLTensor post_ln_weight{};  // [hidden]
  DLTensor post_ln_bias{};    // [hidden]; absent with an RMSNorm
  DLTensor mlp_up_weight{};   // [intermediate, hidden]; gated [2 intermediate, hidden]
  DLTensor mlp_up_bias{};     // of its rows; may be absent
  Position current_seq_len;
  // int32 [rows, max_pages], rows at any distance: the pages of each row's sequence, from
  // position 0 on. With it input and all results have `rows` rows, 1 to kMaxLayerRows, cos and sin
  // have one for each if there are several, mlp_intermediate is [rows, intermediate], and both
  // caches are [pages, page_size, num_kv_heads, head_dim] with pages of 16, 32 or 64 positions and
  // the same strides: any, also with one cache between the other's pages, as long as no element is
  // another's and each head's values lie side by side.
  // A row whose position in a tensor is outside [0, max_pages page_size), or one of whose pages up
  // to it is outside [0, pages), has NaN in all results and writes nothing; other rows do not
  // notice. Entries of the table behind a row's position are not looked at. All rows' new keys and
  // values are written before any are read: rows may be tokens of one sequence that follow each
  // other. No two rows may write to one place (invalid_argument on the CPU; not checked on a GPU).
  DLTensor block_table{};
  // [head_dim]: of an RMSNorm of each head's query and key before RoPE. Both or neither.
  DLTensor q_norm_weight{};
  DLTensor k_norm_weight{};
};

inline constexpr std::int64_t kMaxLayerRows = 16;

struct AttentionMlpUpResults {
  DLTensor attn_output{};       // [1, hidden]: with bias, without residual
  DLTensor mlp_intermediate{};  // [intermediate]: after the activation
  DLTensor k_new{};             // [1, num_kv_heads, head_dim]: after RoPE
  DLTensor v_new{};             // [1, num_kv_heads, head_dim]
};

// `rows` is 1 to kMaxLayerRows.
struct MlpDownTensors {
  DLTensor hidden_states{};     // [rows, hidden]: the layer's input
  DLTensor attn_output{};       // [rows, hidden]
  DLTensor mlp_intermediate{};  // [rows, intermediate], or of one row [intermediate]
  DLTensor mlp_down_weight{};   // [hidden, intermediate]
  DLTensor mlp_down_bias{};     // [hidden]; may be absent
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

// output [rows, hidden] = hidden_states + attn_output + MLP-down of mlp_intermediate.
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
