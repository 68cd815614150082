#include "model/config_values.hpp"

#include <fmt/format.h>

#include <optional>

#include "base/fail.hpp"
#include "model/config_reader.hpp"

namespace clusterfusion {
namespace {

// Far beyond every model, and small enough that no product of two sizes overflows.
constexpr std::int64_t kMaxWidth = std::int64_t{1} << 24;
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kDefaultMaxPositions = 2048;

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

}  // namespace

TokenId parse_token(const JsonValue& value, const ModelConfig& config) {
  return static_cast<TokenId>(value.integer({0, config.vocab_size - 1}));
}

std::vector<TokenId> parse_tokens(const JsonValue& value, const ModelConfig& config) {
  std::vector<TokenId> tokens;
  if (value.is_array()) {
    for (const JsonValue& token : value.array()) tokens.push_back(parse_token(token, config));
  } else if (!value.is_null()) {
    tokens.push_back(parse_token(value, config));
  }
  return tokens;
}

bool boolean_or(const JsonObject& root, std::string_view key, bool fallback) {
  const std::optional<JsonValue> value = root.find(key);
  return value ? value->boolean() : fallback;
}

double number_or(const JsonObject& root, std::string_view key, NumberRange range, double fallback) {
  const std::optional<JsonValue> value = root.find(key);
  return value ? value->number(range) : fallback;
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
  config.num_kv_heads = config.num_heads;
  config.intermediate_size = root.at("intermediate_size").integer({1, kMaxWidth});
  const std::optional<JsonValue> positions = root.find("max_position_embeddings");
  config.max_positions = positions ? positions->integer({1, kMaxTokens}) : kDefaultMaxPositions;
}

void read_kv_heads(const JsonObject& root, std::string_view key, ModelConfig& config) {
  const std::optional<JsonValue> heads = root.find_non_null(key);
  config.num_kv_heads = heads ? heads->integer({1, config.num_heads}) : config.num_heads;
  if (config.num_heads % config.num_kv_heads != 0) {
    heads->fail_expected(fmt::format("a divisor of \"num_attention_heads\" {}", config.num_heads));
  }
}

void read_rope(const JsonObject& root, const std::string& file, const RopeKeys& keys,
               ModelConfig& config) {
  const std::optional<JsonObject> rope = rope_parameters(root);
  check_rope_type(rope, file);
  constexpr NumberRange kTheta{1e-30, 1e30};
  constexpr NumberRange kFraction{0, 1};
  config.rope_theta = rope_parameter(root, rope, "rope_theta", keys.theta, "rope_theta",
                                     keys.default_theta, kTheta);
  const double fraction = rope_parameter(root, rope, "partial_rotary_factor", keys.fraction,
                                         "partial_rotary_factor", keys.default_fraction, kFraction);
  config.rotary_dim = static_cast<std::int64_t>(static_cast<double>(config.head_dim) * fraction);
  if (config.rotary_dim % 2 != 0) {
    fail(ErrorKind::unsupported,
         "{}: a rotary fraction of {} of head size {} rotates {} values; expected an even number, "
         "because values are rotated in pairs",
         file, fraction, config.head_dim, config.rotary_dim);
  }
}

void read_special_tokens(const JsonObject& root, SpecialTokens defaults, ModelConfig& config) {
  if (const std::optional<JsonValue> bos = root.find("bos_token_id")) {
    if (!bos->is_null()) config.bos_token = parse_token(*bos, config);
  } else {
    config.bos_token = defaults.bos;
  }
  if (const std::optional<JsonValue> eos = root.find("eos_token_id")) {
    config.eos_tokens = parse_tokens(*eos, config);
  } else if (defaults.eos < config.vocab_size) {
    config.eos_tokens = {defaults.eos};
  }
}

void read_activation(const JsonObject& root, std::string_view key, std::string_view fallback,
                     const std::string& file, ModelConfig& config) {
  const std::optional<JsonValue> name = root.find(key);
  config.hidden_act = name ? name->string() : fallback;
  config.activation = parse_activation(config.hidden_act, fmt::format("{}: {}", file, quote(key)));
}

}  // namespace clusterfusion
