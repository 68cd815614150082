// A family that only tests know, as another architecture would be added: parallel residual with
// RMSNorm, a gated MLP, grouped heads, no biases.
#pragma once

#include "model/config_values.hpp"
#include "model/families/family.hpp"

namespace clusterfusion::test {

inline void read_grouped_config(const JsonObject& root, const std::string& file,
                                ModelConfig& config) {
  read_sizes(root, config);
  read_kv_heads(root, "num_key_value_heads", config);
  read_rope(root, file, {"rope_theta", 10000.0, "partial_rotary_factor", 1.0}, config);
  read_special_tokens(root, {.bos = 0, .eos = 0}, config);
  read_activation(root, "hidden_act", "silu", file, config);
  config.norm = NormKind::rms_norm;
  config.layer_norm_eps = number_or(root, "rms_norm_eps", {0, 1}, 1e-6);
  config.gated_mlp = true;
  config.attention_bias = config.mlp_bias = false;
  config.tied_embeddings = boolean_or(root, "tie_word_embeddings", false);
}

// Registers the family, once.
inline const Family& grouped_family() {
  static const Family family = {
      .model_type = "grouped",
      .architectures = {"GroupedForCausalLM"},
      .read_config = read_grouped_config,
      .names = {.prefix = "model.",
                .embedding = "embed_tokens",
                .layers = "layers",
                .layer = {"input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj",
                          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"},
                .final_norm = "norm",
                .lm_head = {"lm_head"},
                .ignored = {}}};
  static const bool registered = (add_family(family), true);
  static_cast<void>(registered);
  return family;
}

}  // namespace clusterfusion::test
