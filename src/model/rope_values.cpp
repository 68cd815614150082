// The rotary embedding of a config.json.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "base/fail.hpp"
#include "model/config_values.hpp"

namespace clusterfusion {
namespace {

constexpr NumberRange kPositive{1e-30, 1e30};

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

constexpr std::pair<std::string_view, RopeKind> kKinds[] = {{"default", RopeKind::plain},
                                                            {"linear", RopeKind::linear},
                                                            {"llama3", RopeKind::llama3},
                                                            {"yarn", RopeKind::yarn}};

RopeKind rope_kind(const JsonObject& rope, const std::string& file, bool takes_scaling) {
  std::optional<JsonValue> type = rope.find("rope_type");
  if (!type) type = rope.find("type");
  if (!type) return RopeKind::plain;
  for (const auto& [name, kind] : kKinds) {
    if (name == type->string() && (takes_scaling || kind == RopeKind::plain)) return kind;
  }
  fail(ErrorKind::unsupported, "{}: RoPE scaling of type {} is not supported; expected {}", file,
       quote(type->string()),
       takes_scaling ? R"("default" (none), "linear", "llama3" or "yarn")" : R"("default" (none))");
}

void refuse_rope_of_layers(const JsonObject& rope, const std::string& file) {
  for (const JsonObject::Member& member : rope.members()) {
    if (rope.value_of(member).is_object()) {
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

// A key that is missing or null means `fallback`.
double positive_or(const JsonObject& rope, std::string_view key, double fallback) {
  const std::optional<JsonValue> value = rope.find_non_null(key);
  return value ? value->number(kPositive) : fallback;
}
double number_or_zero(const JsonObject& rope, std::string_view key) {
  const std::optional<JsonValue> value = rope.find_non_null(key);
  return value ? value->number({0, 1e30}) : 0.0;
}

// The longest context before scaling. Beside `rope` it goes first, as in transformers.
double original_positions(const JsonObject& root, const JsonObject& rope,
                          const ModelConfig& config) {
  for (const JsonObject* object : {&root, &rope}) {
    const auto given = object->find_non_null("original_max_position_embeddings");
    if (given) return given->number({1, 1e30});
  }
  return static_cast<double>(config.max_positions);
}

void read_llama3(const JsonObject& rope, RopeScaling& scaling) {
  scaling.low_freq_factor = rope.at("low_freq_factor").number(kPositive);
  const JsonValue high = rope.at("high_freq_factor");
  scaling.high_freq_factor = high.number(kPositive);
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    high.fail_expected(fmt::format("more than \"low_freq_factor\" {}", scaling.low_freq_factor));
  }
}

// What YaRN multiplies cosines and sines by, unless `attention_factor` says it.
double yarn_attention_factor(const JsonObject& rope, double factor) {
  const auto magnitude = [&](double scale) {
    return factor <= 1 ? 1.0 : 0.1 * scale * std::log(factor) + 1.0;
  };
  const double scale = number_or_zero(rope, "mscale");
  const double scale_all = number_or_zero(rope, "mscale_all_dim");
  return scale != 0 && scale_all != 0 ? magnitude(scale) / magnitude(scale_all) : magnitude(1.0);
}

void read_yarn(const JsonObject& rope, ModelConfig& config) {
  RopeScaling& scaling = config.rope_scaling;
  scaling.beta_fast = positive_or(rope, "beta_fast", 32);
  scaling.beta_slow = positive_or(rope, "beta_slow", 1);
  scaling.truncate = boolean_or(rope, "truncate", true);
  scaling.attention_factor =
      positive_or(rope, "attention_factor", yarn_attention_factor(rope, scaling.factor));
  // Often `max_position_embeddings` is left as it was before, and the factor says how far one gets.
  const double longest = std::min(scaling.original_positions * scaling.factor, double{kMaxTokens});
  config.max_positions = std::max(config.max_positions, static_cast<std::int64_t>(longest));
}

void read_scaling(const JsonObject& root, const JsonObject& rope, const std::string& file,
                  bool takes_scaling, ModelConfig& config) {
  refuse_rope_of_layers(rope, file);
  RopeScaling& scaling = config.rope_scaling;
  scaling.kind = rope_kind(rope, file, takes_scaling);
  if (scaling.kind == RopeKind::plain) return;
  scaling.original_positions = original_positions(root, rope, config);
  const JsonValue factor = rope.at("factor");
  // YaRN's may be left to the two lengths.
  scaling.factor = factor.is_null() && scaling.kind == RopeKind::yarn
                       ? static_cast<double>(config.max_positions) / scaling.original_positions
                       : factor.number({1, 1e30});
  if (scaling.kind == RopeKind::llama3) read_llama3(rope, scaling);
  if (scaling.kind == RopeKind::yarn) read_yarn(rope, config);
}

}  // namespace

const char* name_of(RopeKind kind) noexcept {
  for (const auto& [name, named] : kKinds) {
    if (named == kind) return name.data();  // of a literal, so it ends in zero
  }
  return "";
}

void read_rope(const JsonObject& root, const std::string& file, const RopeKeys& keys,
               ModelConfig& config) {
  const std::optional<JsonObject> rope = rope_parameters(root);
  if (rope) read_scaling(root, *rope, file, keys.takes_scaling, config);
  constexpr NumberRange kFraction{0, 1};
  config.rope_theta = rope_parameter(root, rope, "rope_theta", keys.theta, "rope_theta",
                                     keys.default_theta, kPositive);
  require(config.rope_scaling.kind != RopeKind::yarn || config.rope_theta > 1, ErrorKind::malformed,
          "{}: \"rope_theta\": expected more than 1 for RoPE scaling of type \"yarn\", found {}",
          file, config.rope_theta);
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

}  // namespace clusterfusion
