// What a decoder layer of an architecture is, in words and sizes, and which tensors it has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clusterfusion {

// The element-wise function of the MLP, as `hidden_act` of config.json names it. Formulas:
// transformers/activations.py (ACT2FN).
enum class Activation {
  gelu_erf,      // 0.5 x (1 + erf(x / sqrt 2)):        "gelu", "gelu_python"
  gelu_tanh,     // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): "gelu_new", "gelu_fast",
                 // "gelu_pytorch_tanh", "gelu_accurate"
  gelu_quick,    // x sigmoid(1.702 x):                 "quick_gelu"
  relu,          // max(x, 0):                          "relu"
  relu_squared,  // max(x, 0)^2:                        "relu2"
  silu,          // x sigmoid(x):                       "silu", "swish"
  mish,          // x tanh(softplus(x)):                "mish"
  tanh,          //                                     "tanh"
  sigmoid,       //                                     "sigmoid"
  identity,      //                                     "linear"
};

enum class NormKind {
  layer_norm,  // (x - mean) / sqrt(variance + eps) weight + bias (Ba et al., arXiv:1607.06450)
  rms_norm,    // x / sqrt(mean of x^2 + eps) weight (Zhang and Sennrich, arXiv:1910.07467)
};

// How queries, keys and values lie in a checkpoint.
enum class QkvLayout {
  by_kv_head,  // one matrix: for each head of keys and values its queries, its key and its value
  separate,    // three matrices, heads one after the other
};

// How the frequencies of the rotation are changed for contexts longer than those trained on, as
// `rope_type` of config.json names it. Formulas: transformers/modeling_rope_utils.py.
enum class RopeKind {
  plain,   // not at all:                                  "default"
  linear,  // all divided by `factor`:                     "linear"
  llama3,  // the low ones divided by `factor`, smoothly:  "llama3"
  yarn,    // likewise by another rule (Peng et al., arXiv:2309.00071): "yarn"
};

// "default", "linear", "llama3", "yarn".
const char* name_of(RopeKind kind) noexcept;

struct RopeScaling {
  RopeKind kind = RopeKind::plain;
  double factor = 1.0;
  double original_positions = 0.0;                       // the longest context before; llama3, yarn
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn: turns within original_positions
  bool truncate = true;                                  // yarn: its bounds are whole pairs
  double attention_factor = 1.0;                         // cosines and sines are multiplied by it
};

struct LayerSpec {
  std::int64_t hidden_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;  // a divisor of num_heads; 0: as many (see kv_heads())
  std::int64_t head_dim = 0;
  std::int64_t intermediate_size = 0;  // rows of the MLP's first matrix
  std::int64_t rotary_dim = 0;         // the first rotary_dim of head_dim values are rotated; even
  double rope_theta = 10000.0;         // base of the rotary frequencies
  RopeScaling rope_scaling;
  NormKind norm = NormKind::layer_norm;
  double layer_norm_eps = 1e-5;  // of either kind of norm
  Activation activation = Activation::gelu_erf;
  bool parallel_residual = true;  // x + attention(norm1 x) + mlp(norm2 x), else one after the other
  bool gated_mlp = false;         // down(activation(gate x) * up x), else down(activation(up x))
  bool attention_bias = true;     // QKV and output projection have biases
  bool attention_out_bias = true;  // false: the output projection has none even so
  bool mlp_bias = true;            // and the matrices of the MLP
  QkvLayout qkv_layout = QkvLayout::by_kv_head;
  bool qk_norm =
      false;  // each head's query and key pass an RMSNorm of head_dim before the rotation

  std::int64_t kv_heads() const noexcept { return num_kv_heads == 0 ? num_heads : num_kv_heads; }
  // Query heads that share a head of keys and values.
  std::int64_t heads_per_kv_head() const noexcept { return num_heads / kv_heads(); }
  // What the heads give together: columns of the output projection.
  std::int64_t attention_size() const noexcept { return num_heads * head_dim; }
  // Keys of all heads, and as many values: rows of their matrices where these are separate.
  std::int64_t kv_size() const noexcept { return kv_heads() * head_dim; }
  // Queries, keys and values together: rows of the QKV matrix where there is one.
  std::int64_t qkv_size() const noexcept { return attention_size() + 2 * kv_size(); }
};

// A tensor of a layer. Each bias comes right behind its weight.
enum class LayerTensor {
  input_norm_weight,
  input_norm_bias,
  post_norm_weight,
  post_norm_bias,
  qkv_weight,
  qkv_bias,
  mlp_gate_weight,
  mlp_gate_bias,
  mlp_up_weight,
  mlp_up_bias,
  mlp_down_weight,
  mlp_down_bias,
  attention_out_weight,
  attention_out_bias,
  // In place of qkv_weight and qkv_bias, by QkvLayout.
  query_weight,
  query_bias,
  key_weight,
  key_bias,
  value_weight,
  value_bias,
  // Of LayerSpec::qk_norm; no model has the biases.
  query_norm_weight,
  query_norm_bias,
  key_norm_weight,
  key_norm_bias,
};
inline constexpr std::size_t kNumLayerTensors = 24;

constexpr std::size_t index_of(LayerTensor tensor) noexcept {
  return static_cast<std::size_t>(tensor);
}
constexpr bool is_bias(LayerTensor tensor) noexcept { return index_of(tensor) % 2 == 1; }
constexpr LayerTensor bias_of(LayerTensor weight) noexcept {
  return static_cast<LayerTensor>(index_of(weight) + 1);
}

}  // namespace clusterfusion
