// Whatever text config.json and generation_config.json hold: it is refused with an Error, or the
// configuration is one that the library can compute with.
#include <simdjson.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "clusterfusion/error.hpp"
#include "model/config_reader.hpp"

namespace {

using clusterfusion::ModelConfig;

void check(bool condition) {
  if (!condition) std::abort();
}

void check_tokens(const ModelConfig& config) {
  const auto in_vocabulary = [&](clusterfusion::TokenId token) {
    return token >= 0 && token < config.vocab_size;
  };
  if (config.bos_token) check(in_vocabulary(*config.bos_token));
  for (const clusterfusion::TokenId token : config.eos_tokens) check(in_vocabulary(token));
}

void check_config(const ModelConfig& config) {
  check(config.vocab_size > 0 && config.hidden_size > 0 && config.num_layers > 0);
  check(config.intermediate_size > 0 && config.max_positions > 0);
  check(config.num_heads > 0 && config.kv_heads() > 0 && config.head_dim > 0);
  check(config.num_heads % config.kv_heads() == 0);
  check(config.model_type != "gpt_neox" ||
        config.head_dim * config.num_heads == config.hidden_size);
  check(config.rotary_dim >= 0 && config.rotary_dim <= config.head_dim);
  check(config.rotary_dim % 2 == 0);
  check(std::isfinite(config.rope_theta) && config.rope_theta > 0);
  check(config.layer_norm_eps >= 0 && config.layer_norm_eps <= 1);
  check_tokens(config);
}

template <typename Action>
void expect_result_or_error(const Action& action) {
  try {
    action();
  } catch (const clusterfusion::Error& error) {
    const std::string message = error.what();
    check(message.starts_with("fuzz"));
    check(simdjson::validate_utf8(message));
    check(error.kind() == clusterfusion::ErrorKind::malformed ||
          error.kind() == clusterfusion::ErrorKind::unsupported);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  ModelConfig config;
  config.vocab_size = 50304;
  expect_result_or_error([&] { check_config(clusterfusion::parse_config(text, "fuzz")); });
  expect_result_or_error([&] {
    clusterfusion::apply_generation_config(text, "fuzz", config);
    check_tokens(config);
  });
  return 0;
}
