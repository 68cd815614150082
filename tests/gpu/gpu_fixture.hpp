// What the GPU tests share: model shapes, random tokens, and the skip where there is no GPU.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/device_properties.hpp"
#include "plan/decode_plan.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {

struct Shape {
  std::string name;
  std::int64_t hidden, heads, intermediate, layers, vocab, rotary;
  bool parallel = true;
  Activation activation = Activation::gelu_erf;
  DType dtype = DType::float16;
  int positions = 70;
  bool attention_bias = true;
  bool float32_kv = false;
};

// sqrt(sum of (found - expected)^2 / sum of expected^2); NaN, which fails every comparison, if
// there is one among the values.
template <typename Expected>
double relative_error_of(std::span<const float> found, std::span<const Expected> expected) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double want = expected[i];
    difference += (found[i] - want) * (found[i] - want);
    norm += want * want;
  }
  return std::sqrt(difference / norm);
}
inline double relative_error(std::span<const float> found, std::span<const double> expected) {
  return relative_error_of(found, expected);
}
inline double relative_error(std::span<const float> found, std::span<const float> expected) {
  return relative_error_of(found, expected);
}

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.name; }

// Every Pythia size's row lengths and head sizes, with fewer layers and tokens, and the awkward
// ones.
inline std::vector<Shape> gpu_shapes() {
  constexpr auto kErf = Activation::gelu_erf;
  constexpr auto kTanh = Activation::gelu_tanh;
  constexpr auto kHalf = DType::float16;
  return {
      {"tiny", 128, 4, 512, 2, 301, 8},
      {"tiny_sequential", 128, 4, 512, 2, 301, 8, false},
      {"tiny_bf16", 128, 4, 512, 2, 301, 8, true, kErf, DType::bfloat16},
      {"tiny_without_attention_bias", 128, 4, 512, 2, 301, 8, true, kErf, kHalf, 70, false},
      {"one_layer", 128, 4, 512, 1, 301, 8},
      {"head_16", 128, 8, 512, 3, 1000, 4},
      {"pythia_70m_like", 512, 8, 2048, 3, 5003, 16},
      {"pythia_160m_like", 768, 12, 3072, 3, 5003, 16},
      {"pythia_410m_like", 1024, 16, 4096, 3, 5003, 16},
      {"pythia_1b_like", 2048, 8, 8192, 2, 5003, 64},
      {"pythia_1b4_like", 2048, 16, 8192, 2, 5003, 32},
      {"pythia_2b8_like", 2560, 32, 10240, 2, 5003, 20},
      {"pythia_2b8_bf16", 2560, 32, 10240, 2, 5003, 20, true, kErf, DType::bfloat16},
      {"pythia_6b9_like", 4096, 32, 16384, 1, 5003, 32},
      {"pythia_12b_like", 5120, 40, 20480, 1, 5003, 32},
      {"sequential", 512, 8, 2048, 3, 5003, 16, false},
      {"sequential_tanh", 768, 12, 3072, 2, 5003, 64, false, kTanh},
      {"long_context", 512, 8, 2048, 2, 1000, 16, true, kErf, kHalf, 1500},
  };
}

// Shapes that no one kernel streams: a series of kernels decodes them.
inline std::vector<Shape> unstreamed_shapes() {
  constexpr auto kErf = Activation::gelu_erf;
  return {
      {"neox_20b_like", 6144, 64, 24576, 1, 5003, 24},
      {"hidden_2816", 2816, 44, 11264, 2, 5003, 16},
      {"odd_mlp", 704, 11, 1856, 2, 1009, 64, false, kErf, DType::bfloat16},
      {"heads_of_96", 96 * 7, 7, 96 * 11, 3, 777, 48},
  };
}

inline ModelConfig config_of(const Shape& shape) {
  ModelConfig config = small_config();
  config.hidden_size = shape.hidden;
  config.num_heads = shape.heads;
  config.attention_bias = shape.attention_bias;
  config.head_dim = shape.hidden / shape.heads;
  config.intermediate_size = shape.intermediate;
  config.num_layers = shape.layers;
  config.vocab_size = shape.vocab;
  config.rotary_dim = shape.rotary;
  config.max_positions = 4096;
  config.parallel_residual = shape.parallel;
  config.activation = shape.activation;
  config.dtype = shape.dtype;
  return config;
}

// As a backend on the current device has it.
inline plan::KvPlan kv_plan_of(const ModelConfig& config) {
  const plan::DeviceLimits limits = cuda::limits_of(cuda::device_properties());
  return plan::can_stream(config, limits) ? plan::make_decode_plan(config, limits).kv
                                          : plan::make_page_plan(config, config.dtype);
}

inline std::vector<TokenId> random_tokens(std::int64_t vocab, int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(static_cast<std::size_t>(count));
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % vocab);
  return tokens;
}

// Logits at every position, [tokens.size(), vocab], of a sequence of its own.
inline std::vector<float> all_logits(Backend& backend, std::int64_t vocab,
                                     std::span<const TokenId> tokens) {
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(vocab),
                            std::numeric_limits<float>::quiet_NaN());
  const SequenceId id = backend.create_sequence({});
  PrefillOutput output;
  output.all_logits = logits;
  backend.prefill(id, tokens, output);
  backend.release_sequence(id);
  return logits;
}

// The same by decode steps, one token each.
inline std::vector<float> decoded_logits(Backend& backend, std::int64_t vocab,
                                         std::span<const TokenId> tokens) {
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<float> logits(tokens.size() * width, std::numeric_limits<float>::quiet_NaN());
  const SequenceId id = backend.create_sequence({});
  for (std::size_t i = 0; i < tokens.size(); ++i)
    backend.decode(std::vector{id}, tokens.subspan(i, 1), 1, {},
                   std::span(logits).subspan(i * width, width));
  backend.release_sequence(id);
  return logits;
}

// Prompts of one pass, three of up to `longest` tokens among short ones, and rows of one decode
// step: each has the logits that it has alone. For backends whose decode steps have prefill's bits.
inline void expect_company_does_not_matter(Backend& backend, std::int64_t vocab, unsigned longest,
                                           std::mt19937& random) {
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<std::vector<TokenId>> prompts;
  std::vector<std::vector<float>> found;
  std::vector<SequenceId> ids;
  for (unsigned i = 0; i < 20; ++i) {
    const int count = 1 + static_cast<int>(random() % (i < 3 ? longest : 12));
    prompts.push_back(random_tokens(vocab, count + 1, 50 + i));
    found.emplace_back(static_cast<std::size_t>(count) * width);
    ids.push_back(backend.create_sequence({}));
  }
  std::vector<PrefillPart> parts;
  std::vector<TokenId> inputs;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    parts.emplace_back(ids[i], std::span(prompts[i]).first(prompts[i].size() - 1));
    parts.back().output.all_logits = found[i];
    inputs.push_back(prompts[i].back());
  }
  backend.prefill_together(parts);
  std::vector<float> decoded(ids.size() * width);
  backend.decode(ids, inputs, 1, {}, decoded);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto row = std::span(decoded).subspan(i * width, width);
    found[i].insert(found[i].end(), row.begin(), row.end());
    ASSERT_EQ(found[i], all_logits(backend, vocab, prompts[i])) << "text " << i;
  }
}

class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = cuda_unavailable_reason(); !reason.empty())
      GTEST_SKIP() << reason;
  }
};

}  // namespace clusterfusion::test
