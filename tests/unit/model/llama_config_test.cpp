// config.json of Llama, Mistral, Qwen2 and Qwen3: what is read, and what is refused by name.
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "io/file_fixtures.hpp"
#include "model/config_reader.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;

constexpr const char* kTypes[] = {"llama", "mistral", "qwen2", "qwen3"};

nlohmann::json llama_like(const std::string& type,
                          const nlohmann::json& changes = nlohmann::json::object()) {
  nlohmann::json config = {{"model_type", type},       {"vocab_size", 64},
                           {"hidden_size", 48},        {"num_hidden_layers", 2},
                           {"num_attention_heads", 6}, {"num_key_value_heads", 2},
                           {"intermediate_size", 80},  {"max_position_embeddings", 1000},
                           {"rope_theta", 500000.0}};
  config.update(changes);
  return config;
}

ModelConfig parse_llama_like(const nlohmann::json& config) {
  return parse_config(config.dump(), "config.json");
}

void expect_unsupported(std::vector<std::string> words, const nlohmann::json& json) {
  words.push_back("config.json");
  expect_error(ErrorKind::unsupported, words, [&] { parse_llama_like(json); });
}
void expect_malformed(const std::vector<std::string>& words, const nlohmann::json& json) {
  expect_error(ErrorKind::malformed, words, [&] { parse_llama_like(json); });
}

TEST(LlamaConfig, ReadsWhatAllHaveInCommon) {
  for (const char* type : kTypes) {
    SCOPED_TRACE(type);
    const ModelConfig config = parse_llama_like(llama_like(type, {{"head_dim", 16}}));
    EXPECT_EQ(config.model_type, type);
    EXPECT_EQ(config.num_heads, 6);
    EXPECT_EQ(config.num_kv_heads, 2);
    EXPECT_EQ(config.head_dim, 16);
    EXPECT_EQ(config.rotary_dim, 16);
    EXPECT_EQ(config.attention_size(), 96);
    EXPECT_EQ(config.qkv_size(), 160);
    EXPECT_EQ(config.rope_theta, 500000.0);
    EXPECT_EQ(config.rope_scaling.kind, RopeKind::plain);
    EXPECT_EQ(config.layer_norm_eps, 1e-6);
    EXPECT_EQ(config.norm, NormKind::rms_norm);
    EXPECT_EQ(config.activation, Activation::silu);
    EXPECT_EQ(config.qkv_layout, QkvLayout::separate);
    EXPECT_TRUE(config.gated_mlp);
    EXPECT_FALSE(config.parallel_residual);
    EXPECT_FALSE(config.tied_embeddings);
    EXPECT_EQ(config.qk_norm, std::string(type) == "qwen3");
    EXPECT_EQ(config.attention_bias, std::string(type) == "qwen2");
    EXPECT_FALSE(config.mlp_bias);
    EXPECT_EQ(config.max_positions, 1000);
  }
}

TEST(LlamaConfig, ReadsBiasesOfTheFamiliesThatHaveTheChoice) {
  const nlohmann::json biases = {{"attention_bias", true}, {"mlp_bias", true}};
  for (const char* type : kTypes) {
    const std::string name = type;
    const ModelConfig config = parse_llama_like(llama_like(type, biases));
    EXPECT_EQ(config.attention_bias, name != "mistral");
    EXPECT_EQ(config.attention_out_bias, name != "qwen2");
    EXPECT_EQ(config.mlp_bias, name == "llama");
  }
}

TEST(LlamaConfig, KnowsWhatAMissingKeyMeans) {
  const auto without = [](const char* type, std::vector<const char*> keys) {
    nlohmann::json config = llama_like(type, {{"num_attention_heads", 32}, {"hidden_size", 64}});
    for (const char* key : keys) config.erase(key);
    return parse_llama_like(config);
  };
  const std::vector<const char*> keys = {"num_key_value_heads", "max_position_embeddings",
                                         "rope_theta"};
  EXPECT_EQ(without("llama", keys).num_kv_heads, 32);
  EXPECT_EQ(without("mistral", keys).num_kv_heads, 8);
  EXPECT_EQ(without("qwen2", keys).num_kv_heads, 32);
  EXPECT_EQ(without("llama", keys).max_positions, 2048);
  EXPECT_EQ(without("mistral", keys).max_positions, 4096);  // its window
  EXPECT_EQ(without("qwen2", keys).max_positions, 32768);
  EXPECT_EQ(without("llama", keys).rope_theta, 10000.0);
  EXPECT_EQ(without("qwen2", keys).head_dim, 2);
  EXPECT_EQ(without("qwen3", keys).head_dim, 128);
  EXPECT_EQ(without("llama", keys).eos_tokens, std::vector<TokenId>{2});
  EXPECT_EQ(without("llama", keys).bos_token, 1);
  EXPECT_TRUE(without("qwen2", keys).eos_tokens.empty());
  EXPECT_FALSE(without("qwen3", keys).bos_token.has_value());
  EXPECT_EQ(
      parse_llama_like(llama_like("mistral", {{"num_key_value_heads", nullptr}})).num_kv_heads, 6);
  nlohmann::json heads = llama_like("mistral");
  heads.erase("num_key_value_heads");
  expect_malformed({"num_attention_heads", "a multiple of 8", "num_key_value_heads", "found 6"},
                   heads);
}

TEST(LlamaConfig, RefusesHeadsThatCannotBe) {
  expect_malformed({"num_key_value_heads", "a divisor of \"num_attention_heads\" 6", "found 4"},
                   llama_like("llama", {{"num_key_value_heads", 4}}));
  expect_malformed({"num_attention_heads", "a divisor of \"hidden_size\" 50"},
                   llama_like("llama", {{"hidden_size", 50}}));
  EXPECT_EQ(parse_llama_like(llama_like("llama", {{"hidden_size", 50}, {"head_dim", 8}})).head_dim,
            8);
  expect_unsupported({"7 values", "even"}, llama_like("llama", {{"head_dim", 7}}));
  expect_malformed({"num_attention_heads", "at most 1, because heads have 16777216"},
                   llama_like("llama", {{"head_dim", 1 << 24}}));
  expect_unsupported({"partial_rotary_factor", "4 of 8"},
                     llama_like("llama", {{"partial_rotary_factor", 0.5}}));
}

// Both spellings, by `type` or `rope_type`.
TEST(LlamaConfig, ReadsRopeScalings) {
  const nlohmann::json llama3 = {{"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_max_position_embeddings", 500}};
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    for (const char* name : {"rope_type", "type"}) {
      const auto scaling = [&](const char* kind, nlohmann::json others) {
        others[name] = kind;
        return parse_llama_like(llama_like("llama", {{key, others}}));
      };
      EXPECT_EQ(scaling("default", {}).rope_scaling.kind, RopeKind::plain);
      const ModelConfig linear = scaling("linear", {{"factor", 4}});
      EXPECT_EQ(linear.rope_scaling.kind, RopeKind::linear);
      EXPECT_EQ(linear.rope_scaling.factor, 4);
      EXPECT_EQ(linear.rope_theta, 500000.0);
      EXPECT_EQ(linear.max_positions, 1000);
      const ModelConfig smooth = scaling("llama3", llama3);
      EXPECT_EQ(smooth.rope_scaling.kind, RopeKind::llama3);
      EXPECT_EQ(smooth.rope_scaling.high_freq_factor, 4);
      EXPECT_EQ(smooth.rope_scaling.original_positions, 500);
      EXPECT_EQ(smooth.max_positions, 1000);
      const ModelConfig yarn = scaling("yarn", {{"factor", 4.0}, {"rope_theta", 123.0}});
      EXPECT_EQ(yarn.rope_scaling.kind, RopeKind::yarn);
      EXPECT_EQ(yarn.rope_scaling.original_positions, 1000);
      EXPECT_DOUBLE_EQ(yarn.rope_scaling.attention_factor, 0.1 * std::log(4.0) + 1.0);
      EXPECT_EQ(yarn.rope_theta, 123.0);
      EXPECT_EQ(yarn.max_positions, 4000);
      const ModelConfig by_lengths =
          scaling("yarn", {{"factor", nullptr}, {"original_max_position_embeddings", 250}});
      EXPECT_EQ(by_lengths.rope_scaling.factor, 4.0);
      EXPECT_EQ(by_lengths.max_positions, 1000);
    }
  }
}

TEST(LlamaConfig, RefusesRopeScalingsByName) {
  const auto scaled = [](const nlohmann::json& rope) {
    return llama_like("llama", {{"rope_scaling", rope}});
  };
  for (const char* type : {"dynamic", "longrope", "su", "mrope", "proportional"}) {
    expect_unsupported({"RoPE scaling", type, "\"llama3\" or \"yarn\""},
                       scaled({{"type", type}, {"factor", 2.0}}));
  }
  expect_unsupported(
      {"full_attention"},
      llama_like("qwen3", {{"rope_parameters", {{"full_attention", {{"rope_theta", 1}}}}}}));
  expect_malformed({"rope_scaling", "factor"}, scaled({{"type", "linear"}}));
  expect_malformed({"\"factor\"", "from 1"}, scaled({{"type", "linear"}, {"factor", 0.5}}));
  expect_malformed({"low_freq_factor"}, scaled({{"rope_type", "llama3"}, {"factor", 8.0}}));
  expect_malformed({"\"factor\"", "found null"}, scaled({{"type", "linear"}, {"factor", nullptr}}));
  expect_malformed({"high_freq_factor", "more than \"low_freq_factor\" 2", "found 2"},
                   scaled({{"rope_type", "llama3"},
                           {"factor", 8.0},
                           {"low_freq_factor", 2},
                           {"high_freq_factor", 2},
                           {"original_max_position_embeddings", 500}}));
  expect_malformed({"rope_theta", "more than 1"},
                   scaled({{"rope_type", "yarn"}, {"factor", 8.0}, {"rope_theta", 1.0}}));
}

TEST(LlamaConfig, EndsContextsWhereTheAttentionWouldSlide) {
  const auto expect_context = [](const nlohmann::json& json, std::int64_t longest,
                                 std::int64_t window) {
    const ModelConfig config = parse_llama_like(json);
    EXPECT_EQ(config.max_positions, longest) << json;
    EXPECT_EQ(config.sliding_window, window) << json;
  };
  expect_context(llama_like("mistral", {{"sliding_window", 300}}), 300, 300);
  expect_context(llama_like("mistral", {{"sliding_window", nullptr}}), 1000, 0);
  expect_context(llama_like("mistral", {{"sliding_window", 1000}}), 1000, 0);
  expect_context(llama_like("mistral"), 1000, 0);  // 4096 by default
  expect_context(llama_like("llama", {{"sliding_window", 300}}), 1000, 0);
  for (const char* type : {"qwen2", "qwen3"}) {
    const auto of_qwen = [&](nlohmann::json changes) {
      changes["sliding_window"] = 300;
      return llama_like(type, changes);
    };
    expect_context(of_qwen({}), 1000, 0);
    expect_context(of_qwen({{"use_sliding_window", true}}), 1000, 0);  // from layer 28 on
    expect_context(of_qwen({{"use_sliding_window", true}, {"max_window_layers", 1}}), 300, 300);
    expect_context(of_qwen({{"use_sliding_window", false}, {"max_window_layers", 1}}), 1000, 0);
    expect_context(of_qwen({{"use_sliding_window", true},
                            {"layer_types", {"full_attention", "sliding_attention"}}}),
                   300, 300);
    expect_context(of_qwen({{"use_sliding_window", true},
                            {"max_window_layers", 0},
                            {"layer_types", {"full_attention", "full_attention"}}}),
                   1000, 0);
    expect_unsupported({"layer_types", "\"linear_attention\""},
                       of_qwen({{"layer_types", {"linear_attention", "full_attention"}}}));
  }
}

TEST(LlamaConfig, RefusesRelativesByName) {
  for (const char* type :
       {"mixtral", "qwen2_moe", "qwen3_moe", "qwen2_vl", "mllama", "llama4", "gemma2", "phi3"}) {
    expect_unsupported({std::string("\"") + type + "\"", "\"llama\"", "\"qwen3\""},
                       llama_like(type));
  }
  expect_unsupported({"LlamaForSequenceClassification", "LlamaForCausalLM"},
                     llama_like("llama", {{"architectures", {"LlamaForSequenceClassification"}}}));
  expect_unsupported({"MistralForCausalLM", "LlamaForCausalLM"},
                     llama_like("llama", {{"architectures", {"MistralForCausalLM"}}}));
  expect_unsupported({"quantization_config"},
                     llama_like("qwen2", {{"quantization_config", {{"bits", 4}}}}));
}

}  // namespace
}  // namespace clusterfusion
