#include "model/config_reader.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

// Far beyond every model, and small enough that no product of two sizes overflows.
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxTokens = (std::int64_t{1} << 31) - 1;

// What a missing key means: GPTNeoXConfig of transformers.
constexpr std::int64_t kDefaultMaxPositions = 2048;
constexpr double kDefaultLayerNormEps = 1e-5;
constexpr double kDefaultRotaryPct = 0.25;
constexpr double kDefaultRopeTheta = 10000.0;
constexpr TokenId kDefaultBosToken = 0;
constexpr TokenId kDefaultEosToken = 2;

constexpr std::array<std::pair<std::string_view, Activation>, 16> kActivations{{
    {"gelu", Activation::gelu_erf},
    {"gelu_python", Activation::gelu_erf},
    {"gelu_new", Activation::gelu_tanh},
    {"gelu_fast", Activation::gelu_tanh},
    {"gelu_accurate", Activation::gelu_tanh},
    {"gelu_pytorch_tanh", Activation::gelu_tanh},
    {"gelu_python_tanh", Activation::gelu_tanh},
    {"quick_gelu", Activation::gelu_quick},
    {"relu", Activation::relu},
    {"relu2", Activation::relu_squared},
    {"silu", Activation::silu},
    {"swish", Activation::silu},
    {"mish", Activation::mish},
    {"tanh", Activation::tanh},
    {"sigmoid", Activation::sigmoid},
    {"linear", Activation::identity},
}};

bool boolean_or(const JsonObject& object, std::string_view key, bool fallback) {
  const std::optional<JsonValue> value = object.find(key);
  return value ? value->boolean() : fallback;
}

void check_architecture(const JsonObject& root, const std::string& file) {
  const std::optional<JsonValue> model_type = root.find_non_null("model_type");
  if (model_type && model_type->string() != "gpt_neox") {
    fail(ErrorKind::unsupported, "{}: \"model_type\" {} is not supported; expected \"gpt_neox\"",
         file, quote(model_type->string()));
  }
  const std::optional<JsonValue> names = root.find_non_null("architectures");
  bool names_neox = false;
  for (const JsonValue& name : names ? names->array() : std::vector<JsonValue>{}) {
    if (name.string() != "GPTNeoXForCausalLM" && name.string() != "GPTNeoXModel") {
      fail(ErrorKind::unsupported,
           "{}: the architecture {} is not supported; expected \"GPTNeoXForCausalLM\"", file,
           quote(name.string()));
    }
    names_neox = true;
  }
  require(model_type || names_neox, ErrorKind::malformed,
          "{}: neither \"model_type\" nor \"architectures\" says what model this is; expected "
          "\"model_type\": \"gpt_neox\"",
          file);
  if (root.find_non_null("quantization_config")) {
    fail(
        ErrorKind::unsupported,
        "{}: \"quantization_config\": quantized checkpoints are not supported; expected weights in "
        "float16, bfloat16 or float32",
        file);
  }
}

// transformers 5 writes one object, `rope_parameters`; older versions wrote the optional
// `rope_scaling` in its place, which still goes first if it says anything.
std::optional<JsonObject> rope_parameters(const JsonObject& root) {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const std::optional<JsonValue> value = root.find_non_null(key);
    if (!value) continue;
    const JsonObject object(*value);
    if (!object.members().empty()) return object;
  }
  return std::nullopt;
}

void check_rope_type(const std::optional<JsonObject>& rope, const std::string& file) {
  if (!rope) return;
  std::optional<JsonValue> type = rope->find("rope_type");
  if (!type) type = rope->find("type");
  if (type && type->string() != "default") {
    fail(ErrorKind::unsupported,
         "{}: RoPE scaling of type {} is not supported; expected \"default\" (none)", file,
         quote(type->string()));
  }
  for (const JsonObject::Member& member : rope->members()) {
    if (rope->value_of(member).is_object()) {
      fail(ErrorKind::unsupported,
           "{}: RoPE parameters of their own for some layers ({}) are not supported", file,
           quote(member.first));
    }
  }
}

// One RoPE parameter: `new_key` in `rope`, else `old_key` of config.json, else the default.
// Some versions of transformers wrote `alias` beside `old_key`, with the same value. Alone, or with
// another value, it means one thing to some versions and nothing to others: refused.
double rope_parameter(const JsonObject& root, const std::optional<JsonObject>& rope,
                      std::string_view new_key, std::string_view old_key, std::string_view alias,
                      double fallback, NumberRange range) {
  if (rope) {
    if (const std::optional<JsonValue> value = rope->find_non_null(new_key)) {
      return value->number(range);
    }
  }
  const std::optional<JsonValue> value = root.find(old_key);
  const double result = value ? value->number(range) : fallback;
  if (const std::optional<JsonValue> other = root.find_non_null(alias)) {
    if (other->number(range) != result) {
      other->fail_expected(
          fmt::format("equal to \"{}\", which is {}{} (or write the value that holds into "
                      "\"rope_parameters\")",
                      old_key, result, value ? "" : " by default"));
    }
  }
  return result;
}

void read_rope(const JsonObject& root, const std::string& file, ModelConfig& config) {
  const std::optional<JsonObject> rope = rope_parameters(root);
  check_rope_type(rope, file);
  constexpr NumberRange kTheta{1e-30, 1e30};
  constexpr NumberRange kFraction{0, 1};
  config.rope_theta = rope_parameter(root, rope, "rope_theta", "rotary_emb_base", "rope_theta",
                                     kDefaultRopeTheta, kTheta);
  const double fraction = rope_parameter(root, rope, "partial_rotary_factor", "rotary_pct",
                                         "partial_rotary_factor", kDefaultRotaryPct, kFraction);
  // GPTNeoXAttention.__init__: rounded down.
  config.rotary_dim = static_cast<std::int64_t>(static_cast<double>(config.head_dim) * fraction);
  if (config.rotary_dim % 2 != 0) {
    fail(ErrorKind::unsupported,
         "{}: a rotary fraction of {} of head size {} rotates {} values; expected an even number, "
         "because values are rotated in pairs",
         file, fraction, config.head_dim, config.rotary_dim);
  }
}

void read_sizes(const JsonObject& root, ModelConfig& config) {
  config.vocab_size = root.at("vocab_size").integer({1, kMaxTokens});
  config.hidden_size = root.at("hidden_size").integer({1, kMaxWidth});
  config.num_layers = root.at("num_hidden_layers").integer({1, kMaxLayers});
  const JsonValue num_heads = root.at("num_attention_heads");
  config.num_heads = num_heads.integer({1, config.hidden_size});
  if (config.hidden_size % config.num_heads != 0) {
    num_heads.fail_expected(fmt::format("a divisor of \"hidden_size\" {}", config.hidden_size));
  }
  config.head_dim = config.hidden_size / config.num_heads;
  if (const std::optional<JsonValue> head_dim = root.find_non_null("head_dim")) {
    if (head_dim->integer() != config.head_dim) {
      head_dim->fail_expected(
          fmt::format("{}, \"hidden_size\" / \"num_attention_heads\"", config.head_dim));
    }
  }
  config.intermediate_size = root.at("intermediate_size").integer({1, kMaxWidth});
  const std::optional<JsonValue> positions = root.find("max_position_embeddings");
  config.max_positions = positions ? positions->integer({1, kMaxTokens}) : kDefaultMaxPositions;
}

TokenId parse_token(const JsonValue& value, const ModelConfig& config) {
  return static_cast<TokenId>(value.integer({0, config.vocab_size - 1}));
}

// null, a token id, or a list of them.
std::vector<TokenId> parse_tokens(const JsonValue& value, const ModelConfig& config) {
  std::vector<TokenId> tokens;
  if (value.is_array()) {
    for (const JsonValue& token : value.array()) tokens.push_back(parse_token(token, config));
  } else if (!value.is_null()) {
    tokens.push_back(parse_token(value, config));
  }
  return tokens;
}

void read_special_tokens(const JsonObject& root, ModelConfig& config) {
  if (const std::optional<JsonValue> bos = root.find("bos_token_id")) {
    if (!bos->is_null()) config.bos_token = parse_token(*bos, config);
  } else {
    config.bos_token = kDefaultBosToken;
  }
  if (const std::optional<JsonValue> eos = root.find("eos_token_id")) {
    config.eos_tokens = parse_tokens(*eos, config);
  } else if (kDefaultEosToken < config.vocab_size) {
    config.eos_tokens = {kDefaultEosToken};
  }
}

}  // namespace

Activation parse_activation(std::string_view name, std::string_view where) {
  for (const auto& [spelling, activation] : kActivations) {
    if (spelling == name) return activation;
  }
  std::vector<std::string_view> known;
  for (const auto& entry : kActivations) known.push_back(entry.first);
  fail(ErrorKind::unsupported, "{} {} is not supported; expected one of {}", where, quote(name),
       fmt::join(known, ", "));
}

ModelConfig parse_config(std::string_view json, const std::string& file) {
  const JsonDocument document(json, file);
  const JsonObject root(document.root());
  check_architecture(root, file);

  ModelConfig config;
  read_sizes(root, config);
  read_rope(root, file, config);
  read_special_tokens(root, config);
  const std::optional<JsonValue> eps = root.find("layer_norm_eps");
  config.layer_norm_eps = eps ? eps->number({0, 1}) : kDefaultLayerNormEps;
  const std::optional<JsonValue> hidden_act = root.find("hidden_act");
  config.hidden_act = hidden_act ? hidden_act->string() : "gelu";
  config.activation = parse_activation(config.hidden_act, file + ": \"hidden_act\"");
  config.parallel_residual = boolean_or(root, "use_parallel_residual", true);
  config.attention_bias = boolean_or(root, "attention_bias", true);
  config.tied_embeddings = boolean_or(root, "tie_word_embeddings", false);
  return config;
}

void apply_generation_config(std::string_view json, const std::string& file, ModelConfig& config) {
  const JsonDocument document(json, file);
  const JsonObject root(document.root());
  if (const std::optional<JsonValue> bos = root.find_non_null("bos_token_id")) {
    config.bos_token = parse_token(*bos, config);
  }
  if (const std::optional<JsonValue> eos = root.find_non_null("eos_token_id")) {
    config.eos_tokens = parse_tokens(*eos, config);
  }
}

GenerationConfig parse_generation_config(std::string_view json, const std::string& file) {
  const JsonDocument document(json, file);
  const JsonObject root(document.root());
  const auto number = [&](std::string_view key, NumberRange range) -> std::optional<float> {
    const std::optional<JsonValue> value = root.find_non_null(key);
    if (!value) return std::nullopt;
    return static_cast<float>(value->number(range));
  };
  GenerationConfig config;
  const std::optional<JsonValue> do_sample = root.find_non_null("do_sample");
  config.do_sample = do_sample && do_sample->boolean();
  config.temperature = number("temperature", {0, std::numeric_limits<float>::max()});
  config.top_p = number("top_p", {0, 1});
  config.min_p = number("min_p", {0, 1});
  config.repetition_penalty = number("repetition_penalty", {0, std::numeric_limits<float>::max()});
  if (const auto top_k = root.find_non_null("top_k")) {
    config.top_k = static_cast<std::int32_t>(top_k->integer({0, kMaxTokens}));
  }
  if (const auto count = root.find_non_null("max_new_tokens")) {
    config.max_new_tokens = count->integer();
  }
  return config;
}

}  // namespace clusterfusion
