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

namespace {

// Where the key says nothing, the heads share the hidden size out among them.
void read_head_dim(const JsonObject& root, const JsonValue& num_heads, const SizeDefaults& defaults,
                   ModelConfig& config) {
  const std::optional<JsonValue> given = root.find_non_null("head_dim");
  const bool is_own = defaults.head_dim == HeadDim::own;
  if (is_own && (given || (defaults.head_size > 0 && !root.find("head_dim")))) {
    config.head_dim = given ? given->integer({1, kMaxWidth}) : defaults.head_size;
    if (config.attention_size() > kMaxWidth)
      num_heads.fail_expected(fmt::format("at most {}, because heads have {} values",
                                          kMaxWidth / config.head_dim, config.head_dim));
    return;
  }
  if (config.hidden_size % config.num_heads != 0) {
    num_heads.fail_expected(fmt::format("a divisor of \"hidden_size\" {}", config.hidden_size));
  }
  config.head_dim = config.hidden_size / config.num_heads;
  if (given && given->integer() != config.head_dim) {
    given->fail_expected(
        fmt::format("{}, \"hidden_size\" / \"num_attention_heads\"", config.head_dim));
  }
}

}  // namespace

void read_sizes(const JsonObject& root, ModelConfig& config, const SizeDefaults& defaults) {
  config.vocab_size = root.at("vocab_size").integer({1, kMaxTokens});
  config.hidden_size = root.at("hidden_size").integer({1, kMaxWidth});
  config.num_layers = root.at("num_hidden_layers").integer({1, kMaxLayers});
  const JsonValue num_heads = root.at("num_attention_heads");
  const bool is_own = defaults.head_dim == HeadDim::own;
  config.num_heads = num_heads.integer({1, is_own ? kMaxWidth : config.hidden_size});
  read_head_dim(root, num_heads, defaults, config);
  config.num_kv_heads = config.num_heads;
  config.intermediate_size = root.at("intermediate_size").integer({1, kMaxWidth});
  const std::optional<JsonValue> positions = root.find("max_position_embeddings");
  config.max_positions = positions ? positions->integer({1, kMaxTokens}) : defaults.max_positions;
}

void read_kv_heads(const JsonObject& root, std::string_view key, ModelConfig& config,
                   std::int64_t missing) {
  const std::optional<JsonValue> heads = root.find(key);
  const bool says_number = heads && !heads->is_null();
  config.num_kv_heads = says_number             ? heads->integer({1, config.num_heads})
                        : heads || missing == 0 ? config.num_heads
                                                : missing;
  if (config.num_heads % config.num_kv_heads == 0) return;
  const std::string expected =
      fmt::format("a divisor of \"num_attention_heads\" {}", config.num_heads);
  if (says_number) heads->fail_expected(expected);
  root.at("num_attention_heads")
      .fail_expected(fmt::format("a multiple of {}, which a missing {} means", config.num_kv_heads,
                                 quote(key)));
}

void read_special_tokens(const JsonObject& root, SpecialTokens defaults, ModelConfig& config) {
  if (const std::optional<JsonValue> bos = root.find("bos_token_id")) {
    if (!bos->is_null()) config.bos_token = parse_token(*bos, config);
  } else {
    config.bos_token = defaults.bos;
  }
  if (const std::optional<JsonValue> eos = root.find("eos_token_id")) {
    config.eos_tokens = parse_tokens(*eos, config);
  } else if (defaults.eos && *defaults.eos < config.vocab_size) {
    config.eos_tokens = {*defaults.eos};
  }
}

void read_activation(const JsonObject& root, std::string_view key, std::string_view fallback,
                     const std::string& file, ModelConfig& config) {
  const std::optional<JsonValue> name = root.find(key);
  config.hidden_act = name ? name->string() : fallback;
  config.activation = parse_activation(config.hidden_act, fmt::format("{}: {}", file, quote(key)));
}

}  // namespace clusterfusion
