// Llama and what is built like it: Mistral, Qwen2 and Qwen3 (those without experts). What a missing
// key means is what it means to their configurations in transformers 5; names are those of its
// LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "base/fail.hpp"
#include "model/config_values.hpp"
#include "model/families/family.hpp"

namespace clusterfusion {
namespace {

// What missing keys mean, and what is told apart by the family alone.
struct Defaults {
  SizeDefaults sizes;
  std::int64_t num_kv_heads = 0;
  SpecialTokens tokens{};
};

void read_common(const JsonObject& root, const std::string& file, const Defaults& defaults,
                 ModelConfig& config) {
  read_sizes(root, config, defaults.sizes);
  read_kv_heads(root, "num_key_value_heads", config, defaults.num_kv_heads);
  read_rope(root, file,
            {.theta = "rope_theta",
             .default_theta = 10000.0,
             .fraction = "partial_rotary_factor",
             .default_fraction = 1.0,
             .takes_scaling = true},
            config);
  require(config.rotary_dim == config.head_dim, ErrorKind::unsupported,
          "{}: \"partial_rotary_factor\": {} of {} values of a head would be rotated; in this "
          "family all are",
          file, config.rotary_dim, config.head_dim);
  read_special_tokens(root, defaults.tokens, config);
  read_activation(root, "hidden_act", "silu", file, config);
  config.norm = NormKind::rms_norm;
  config.layer_norm_eps = number_or(root, "rms_norm_eps", {0, 1}, 1e-6);
  config.parallel_residual = false;
  config.gated_mlp = true;
  config.attention_bias = config.mlp_bias = false;
  config.qkv_layout = QkvLayout::separate;
  config.tied_embeddings = boolean_or(root, "tie_word_embeddings", false);
}

// Contexts end where the window would begin to move.
void limit_to_window(std::int64_t window, ModelConfig& config) {
  if (window >= config.max_positions) return;
  config.sliding_window = window;
  config.max_positions = window;
}

// Null: none.
std::int64_t window_of(const JsonObject& root) {
  constexpr std::int64_t kMissing = 4096;
  const std::optional<JsonValue> window = root.find("sliding_window");
  if (!window) return kMissing;
  return window->is_null() ? kMaxTokens : window->integer({1, kMaxTokens});
}

// Whether a layer's attention slides, of those that may: by name, or all from a number on.
bool has_sliding_layer(const JsonObject& root, const std::string& file, const ModelConfig& config) {
  const std::optional<JsonValue> types = root.find_non_null("layer_types");
  if (!types) {
    const std::optional<JsonValue> full = root.find_non_null("max_window_layers");
    return (full ? full->integer() : 28) < config.num_layers;
  }
  bool slides = false;
  for (const JsonValue& type : types->array()) {
    const std::string_view name = type.string();
    require(name == "full_attention" || name == "sliding_attention", ErrorKind::unsupported,
            "{}: \"layer_types\": layers of type {} are not supported; expected "
            "\"full_attention\" or \"sliding_attention\"",
            file, quote(name));
    slides = slides || name == "sliding_attention";
  }
  return slides;
}

void read_llama(const JsonObject& root, const std::string& file, ModelConfig& config) {
  read_common(root, file, {.sizes = {.head_dim = HeadDim::own}, .tokens = {.bos = 1, .eos = 2}},
              config);
  config.attention_bias = boolean_or(root, "attention_bias", false);
  config.mlp_bias = boolean_or(root, "mlp_bias", false);
}

void read_mistral(const JsonObject& root, const std::string& file, ModelConfig& config) {
  read_common(root, file,
              {.sizes = {.max_positions = 4096 * 32, .head_dim = HeadDim::own},
               .num_kv_heads = 8,
               .tokens = {.bos = 1, .eos = 2}},
              config);
  limit_to_window(window_of(root), config);
}

void read_qwen(const JsonObject& root, const std::string& file, std::int64_t head_size,
               ModelConfig& config) {
  read_common(root, file,
              {.sizes = {.max_positions = 32768, .head_dim = HeadDim::own, .head_size = head_size},
               .num_kv_heads = 32},
              config);
  const bool slides = has_sliding_layer(root, file, config);
  if (slides && boolean_or(root, "use_sliding_window", false)) {
    limit_to_window(window_of(root), config);
  }
}

void read_qwen2(const JsonObject& root, const std::string& file, ModelConfig& config) {
  read_qwen(root, file, 0, config);
  config.attention_bias = true;
  config.attention_out_bias = false;
}

void read_qwen3(const JsonObject& root, const std::string& file, ModelConfig& config) {
  read_qwen(root, file, 128, config);
  config.attention_bias = boolean_or(root, "attention_bias", false);
  config.qk_norm = true;
}

TensorNames names() {
  return {.prefix = "model.",
          .embedding = "embed_tokens",
          .layers = "layers",
          .layer = {"input_layernorm", "post_attention_layernorm", "", "mlp.gate_proj",
                    "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj",
                    "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm", "self_attn.k_norm"},
          .final_norm = "norm",
          .lm_head = {"lm_head"},
          .ignored = {"rotary_emb.inv_freq"}};
}

}  // namespace

const Family& llama_family() {
  static const Family family{.model_type = "llama",
                             .architectures = {"LlamaForCausalLM", "LlamaModel"},
                             .read_config = read_llama,
                             .names = names()};
  return family;
}

const Family& mistral_family() {
  static const Family family{.model_type = "mistral",
                             .architectures = {"MistralForCausalLM", "MistralModel"},
                             .read_config = read_mistral,
                             .names = names()};
  return family;
}

const Family& qwen2_family() {
  static const Family family{.model_type = "qwen2",
                             .architectures = {"Qwen2ForCausalLM", "Qwen2Model"},
                             .read_config = read_qwen2,
                             .names = names()};
  return family;
}

const Family& qwen3_family() {
  static const Family family{.model_type = "qwen3",
                             .architectures = {"Qwen3ForCausalLM", "Qwen3Model"},
                             .read_config = read_qwen3,
                             .names = names()};
  return family;
}

}  // namespace clusterfusion
