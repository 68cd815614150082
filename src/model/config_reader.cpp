#include "model/config_reader.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "model/config_values.hpp"
#include "model/families/family.hpp"

namespace clusterfusion {
namespace {

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
  const Family& family = family_of(root, file);
  require(
      !root.find_non_null("quantization_config"), ErrorKind::unsupported,
      "{}: \"quantization_config\": quantized checkpoints are not supported; expected weights in "
      "float16, bfloat16 or float32",
      file);
  ModelConfig config;
  config.model_type = family.model_type;
  family.read_config(root, file, config);
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
    const double least = range.above_min ? std::numeric_limits<float>::denorm_min() : range.min;
    return static_cast<float>(std::max(value->number(range), least));
  };
  constexpr double kMost = std::numeric_limits<float>::max();
  GenerationConfig config;
  const std::optional<JsonValue> do_sample = root.find_non_null("do_sample");
  config.do_sample = do_sample && do_sample->boolean();
  config.temperature = number("temperature", {0, kMost});
  // Without do_sample nobody reads it.
  config.top_p = number("top_p", {.min = 0, .max = 1, .above_min = config.do_sample});
  config.min_p = number("min_p", {0, 1});
  config.repetition_penalty =
      number("repetition_penalty", {.min = 0, .max = kMost, .above_min = true});
  if (const auto top_k = root.find_non_null("top_k")) {
    config.top_k = static_cast<std::int32_t>(top_k->integer({0, kMaxTokens}));
  }
  if (const auto count = root.find_non_null("max_new_tokens")) {
    config.max_new_tokens = count->integer();
  }
  return config;
}

}  // namespace clusterfusion
