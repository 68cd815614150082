#include "model/config_reader.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "io/file_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;

const nlohmann::json kSizes = {{"model_type", "gpt_neox"}, {"vocab_size", 64},
                               {"hidden_size", 32},        {"num_hidden_layers", 1},
                               {"num_attention_heads", 2}, {"intermediate_size", 48}};

ModelConfig parse(const nlohmann::json& config) {
  return parse_config(config.dump(), "config.json");
}

nlohmann::json with(const std::string& key, const nlohmann::json& value) {
  nlohmann::json config = kSizes;
  config[key] = value;
  return config;
}

nlohmann::json without(const std::string& key) {
  nlohmann::json config = kSizes;
  config.erase(key);
  return config;
}

// data/config_cases.json: how transformers read the same configurations.
TEST(ParseConfig, ReadsWhatTransformersReads) {
  std::ifstream recording(CF_SOURCE_DIR "/tests/unit/model/data/config_cases.json");
  const nlohmann::json cases = nlohmann::json::parse(recording)["cases"];
  ASSERT_GT(cases.size(), 20U);
  for (const nlohmann::json& recorded : cases) {
    SCOPED_TRACE(recorded["config"].dump());
    const ModelConfig config = parse(recorded["config"]);
    const nlohmann::json& expected = recorded["read"];
    EXPECT_EQ(config.head_dim, expected["head_dim"].get<std::int64_t>());
    EXPECT_EQ(config.rotary_dim, expected["rotary_dim"].get<std::int64_t>());
    EXPECT_EQ(config.rope_theta, expected["rope_theta"].get<double>());
    EXPECT_EQ(config.layer_norm_eps, expected["layer_norm_eps"].get<double>());
    EXPECT_EQ(config.max_positions, expected["max_positions"].get<std::int64_t>());
    EXPECT_EQ(config.parallel_residual, expected["parallel_residual"].get<bool>());
    EXPECT_EQ(config.attention_bias, expected["attention_bias"].get<bool>());
    EXPECT_EQ(config.tied_embeddings, expected["tied"].get<bool>());
    EXPECT_EQ(config.bos_token.has_value(), !expected["bos"].is_null());
    if (config.bos_token) {
      EXPECT_EQ(*config.bos_token, expected["bos"].get<TokenId>());
    }
    EXPECT_EQ(config.eos_tokens, expected["eos"].get<std::vector<TokenId>>());
  }
}

TEST(ParseConfig, ReadsSizes) {
  nlohmann::json json = with("num_attention_heads", 4);
  json["max_position_embeddings"] = 100;
  const ModelConfig config = parse(json);
  EXPECT_EQ(config.vocab_size, 64);
  EXPECT_EQ(config.hidden_size, 32);
  EXPECT_EQ(config.num_layers, 1);
  EXPECT_EQ(config.num_heads, 4);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.intermediate_size, 48);
  EXPECT_EQ(config.max_positions, 100);
}

TEST(ParseConfig, KnowsActivations) {
  const std::vector<std::pair<const char*, Activation>> activations = {
      {"gelu", Activation::gelu_erf},
      {"gelu_python", Activation::gelu_erf},
      {"gelu_new", Activation::gelu_tanh},
      {"gelu_fast", Activation::gelu_tanh},
      {"gelu_accurate", Activation::gelu_tanh},
      {"gelu_pytorch_tanh", Activation::gelu_tanh},
      {"relu", Activation::relu},
      {"gelu_python_tanh", Activation::gelu_tanh},
      {"relu2", Activation::relu_squared},
      {"quick_gelu", Activation::gelu_quick},
      {"silu", Activation::silu},
      {"swish", Activation::silu},
      {"mish", Activation::mish},
      {"tanh", Activation::tanh},
      {"sigmoid", Activation::sigmoid},
      {"linear", Activation::identity}};
  for (const auto& [name, activation] : activations) {
    const ModelConfig config = parse(with("hidden_act", name));
    EXPECT_EQ(config.activation, activation) << name;
    EXPECT_EQ(config.hidden_act, name);
  }
  EXPECT_EQ(parse(kSizes).hidden_act, "gelu");
  for (const char* name : {"gelu_10", "relu6", "GELU", ""}) {
    expect_error(ErrorKind::unsupported, {"config.json", "hidden_act", name, "gelu_new", "linear"},
                 [&] { parse(with("hidden_act", name)); });
  }
}

TEST(ParseConfig, RefusesOtherModelsByName) {
  const auto expect_unsupported = [](std::vector<std::string> words, const nlohmann::json& json) {
    words.push_back("config.json");
    expect_error(ErrorKind::unsupported, words, [&] { parse(json); });
  };
  expect_unsupported({"\"mixtral\"", "gpt_neox"}, with("model_type", "mixtral"));
  expect_unsupported({"\"GPTNeoXForSequenceClassification\"", "GPTNeoXForCausalLM"},
                     with("architectures", {"GPTNeoXForSequenceClassification"}));
  expect_unsupported({"quantization_config"}, with("quantization_config", {{"bits", 4}}));
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    for (const char* type : {"linear", "dynamic", "yarn", "longrope", "llama3"}) {
      expect_unsupported({"RoPE scaling", type}, with(key, {{"type", type}, {"factor", 2.0}}));
      expect_unsupported({"RoPE scaling", type}, with(key, {{"rope_type", type}}));
    }
  }
  expect_unsupported({"full_attention"},
                     with("rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}));
  expect_unsupported({"0.45", "head size 16", "7 values", "even"}, with("rotary_pct", 0.45));
}

TEST(ParseConfig, TakesTheArchitectureWhereThereIsNoModelType) {
  nlohmann::json config = without("model_type");
  expect_error(ErrorKind::malformed, {"config.json", "model_type", "architectures"},
               [&] { parse(config); });
  config["architectures"] = {"GPTNeoXForCausalLM"};
  EXPECT_EQ(parse(config).hidden_size, 32);
}

TEST(ParseConfig, NamesAMissingSize) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                          "intermediate_size"}) {
    expect_error(ErrorKind::malformed, {"config.json has no key", key},
                 [&] { parse(without(key)); });
  }
}

TEST(ParseConfig, NamesAWrongValue) {
  const auto expect_malformed = [](const std::string& key, const nlohmann::json& value,
                                   const std::string& expected) {
    expect_error(ErrorKind::malformed,
                 {"config.json: \"" + key + "\"", expected, "found " + value.dump()},
                 [&] { parse(with(key, value)); });
  };
  expect_malformed("vocab_size", 0, "from 1 to 2147483647");
  expect_malformed("vocab_size", 2147483648, "from 1 to 2147483647");
  expect_malformed("hidden_size", "32", "an integer");
  expect_malformed("hidden_size", 32.5, "an integer");
  expect_malformed("hidden_size", nullptr, "an integer");
  expect_malformed("hidden_size", 1LL << 60, "an integer from 1");
  expect_malformed("num_hidden_layers", -1, "from 1 to 4096");
  expect_malformed("num_attention_heads", 3, "a divisor of \"hidden_size\" 32");
  expect_malformed("num_attention_heads", 64, "from 1 to 32");
  expect_malformed("head_dim", 8, "16, \"hidden_size\" / \"num_attention_heads\"");
  expect_malformed("intermediate_size", 0, "from 1");
  expect_malformed("max_position_embeddings", 0, "from 1");
  expect_malformed("layer_norm_eps", -1e-5, "a number from 0");
  expect_malformed("layer_norm_eps", "1e-5", "a number");
  expect_malformed("rotary_pct", 1.5, "a number from 0 to 1");
  expect_malformed("rotary_pct", nullptr, "a number from 0 to 1");
  expect_malformed("rotary_emb_base", 0, "a number from");
  expect_malformed("rotary_emb_base", -10000, "a number from");
  expect_malformed("use_parallel_residual", 1, "true or false");
  expect_malformed("attention_bias", nullptr, "true or false");
  expect_malformed("tie_word_embeddings", "yes", "true or false");
  expect_malformed("hidden_act", 3, "a string");
  expect_malformed("bos_token_id", 64, "an integer from 0 to 63");
  expect_malformed("eos_token_id", -1, "an integer from 0 to 63");
  expect_malformed("eos_token_id", "2", "an integer from 0 to 63");
  expect_malformed("architectures", "GPTNeoXForCausalLM", "a list");
  expect_malformed("rope_scaling", "linear", "an object");
  expect_error(ErrorKind::malformed, {"\"eos_token_id\"[1]", "from 0 to 63", "found 64"}, [&] {
    parse(with("eos_token_id", {0, 64}));
  });
  expect_error(ErrorKind::malformed, {"\"rope_parameters\": \"rope_theta\"", "found \"x\""}, [&] {
    parse(with("rope_parameters", {{"rope_theta", "x"}}));
  });
}

// Versions of transformers disagree on what these mean.
TEST(ParseConfig, RefusesRopeKeysThatContradictEachOther) {
  expect_error(ErrorKind::malformed,
               {"\"rope_theta\"", "\"rotary_emb_base\"", "10000 by default", "found 777"},
               [&] { parse(with("rope_theta", 777)); });
  nlohmann::json config = with("partial_rotary_factor", 1.0);
  config["rotary_pct"] = 0.5;
  expect_error(ErrorKind::malformed, {"\"partial_rotary_factor\"", "\"rotary_pct\"", "0.5"},
               [&] { parse(config); });
}

TEST(ParseConfig, RefusesBrokenJson) {
  expect_error(ErrorKind::malformed, {"config.json", "line 2"},
               [] { parse_config("{\n\"a\" 1}", "config.json"); });
  expect_error(ErrorKind::malformed, {"config.json", "an object"},
               [] { parse_config("[]", "config.json"); });
  expect_error(ErrorKind::malformed, {"config.json", "\"hidden_size\"", "twice"},
               [] { parse_config(R"({"hidden_size": 1, "hidden_size": 2})", "config.json"); });
}

// A vocabulary too small for transformers' default end-of-text token has none.
TEST(ParseConfig, LeavesOutADefaultTokenThatDoesNotExist) {
  EXPECT_TRUE(parse(with("vocab_size", 2)).eos_tokens.empty());
}

TEST(ApplyGenerationConfig, ReplacesTokensThatItNames) {
  ModelConfig config = parse(with("eos_token_id", 7));
  apply_generation_config("{}", "g.json", config);
  apply_generation_config(R"({"eos_token_id": null, "bos_token_id": null})", "g.json", config);
  EXPECT_EQ(config.eos_tokens, std::vector<TokenId>{7});
  EXPECT_EQ(config.bos_token, 0);
  apply_generation_config(R"({"eos_token_id": [1, 3], "bos_token_id": 4})", "g.json", config);
  EXPECT_EQ(config.eos_tokens, (std::vector<TokenId>{1, 3}));
  EXPECT_EQ(config.bos_token, 4);
  expect_error(ErrorKind::malformed, {"g.json: \"eos_token_id\"", "from 0 to 63", "found 64"},
               [&] { apply_generation_config(R"({"eos_token_id": 64})", "g.json", config); });
}

}  // namespace
}  // namespace clusterfusion
