// GPT-NeoX: EleutherAI's Pythia suite and its relatives. What a missing key means is what it means
// to GPTNeoXConfig of transformers 5; names are those of its GPTNeoXForCausalLM.
#include "model/config_values.hpp"
#include "model/families/family.hpp"

namespace clusterfusion {
namespace {

void read_gpt_neox_config(const JsonObject& root, const std::string& file, ModelConfig& config) {
  read_sizes(root, config);
  // GPTNeoXAttention.__init__ rounds the rotary size down.
  read_rope(root, file, {"rotary_emb_base", 10000.0, "rotary_pct", 0.25}, config);
  read_special_tokens(root, {.bos = 0, .eos = 2}, config);
  read_activation(root, "hidden_act", "gelu", file, config);
  config.layer_norm_eps = number_or(root, "layer_norm_eps", {0, 1}, 1e-5);
  config.parallel_residual = boolean_or(root, "use_parallel_residual", true);
  config.attention_bias = boolean_or(root, "attention_bias", true);
  config.tied_embeddings = boolean_or(root, "tie_word_embeddings", false);
}

}  // namespace

const Family& gpt_neox_family() {
  static const Family family{
      .model_type = "gpt_neox",
      .architectures = {"GPTNeoXForCausalLM", "GPTNeoXModel"},
      .read_config = read_gpt_neox_config,
      .names = {
          .prefix = "gpt_neox.",
          .embedding = "embed_in",
          .layers = "layers",
          .layer = {"input_layernorm", "post_attention_layernorm", "attention.query_key_value", "",
                    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"},
          .final_norm = "final_layer_norm",
          // transformers saves it as embed_out; version 5 calls it lm_head in memory and
          // loads either name.
          .lm_head = {"embed_out", "lm_head"},
          .ignored = {".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"}}};
  return family;
}

}  // namespace clusterfusion
