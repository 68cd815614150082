// The streaming decode kernel against the float64 reference, and against itself bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "sampling/sampler.hpp"
#include "support/random_model.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

struct Shape {
  std::string name;
  std::int64_t hidden, heads, intermediate, layers, vocab, rotary;
  bool parallel = true;
  Activation activation = Activation::gelu_erf;
  DType dtype = DType::float16;
  int positions = 70;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.name; }

ModelConfig config_of(const Shape& shape) {
  ModelConfig config = small_config();
  config.hidden_size = shape.hidden;
  config.num_heads = shape.heads;
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

std::vector<TokenId> random_tokens(std::int64_t vocab, int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % vocab);
  return tokens;
}

double relative_error(std::span<const float> found, std::span<const double> expected) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);  // NaN fails every comparison
}

class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string reason = cuda_unavailable_reason(); !reason.empty())
      GTEST_SKIP() << reason;
  }
};

class DecodeKernel : public GpuTest, public testing::WithParamInterface<Shape> {};

std::vector<float> all_logits(Backend& backend, std::int64_t vocab,
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

TEST_P(DecodeKernel, MatchesFloat64AtEveryPosition) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto tokens = random_tokens(config.vocab_size, GetParam().positions, 7);
  const auto found = all_logits(*backend, config.vocab_size, tokens);
  const auto expected = reference_logits(*model, tokens);
  const double error = relative_error(found, expected);
  RecordProperty("relative_error", std::to_string(error));
  std::printf("%-24s relative error %.2e\n", GetParam().name.c_str(), error);
  EXPECT_LT(error, config.dtype == DType::float16 ? 2e-3 : 1.5e-2);
}

TEST_P(DecodeKernel, IsBitIdenticalFromRunToRun) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto tokens = random_tokens(config.vocab_size, GetParam().positions, 8);
  const auto first = all_logits(*backend, config.vocab_size, tokens);
  for (int repeat = 0; repeat < 3; ++repeat)
    ASSERT_EQ(all_logits(*backend, config.vocab_size, tokens), first) << "repeat " << repeat;
}

TEST_P(DecodeKernel, ChoosesWhatTheSamplerChooses) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto prompt = random_tokens(config.vocab_size, 9, 9);
  for (const float temperature : {0.0f, 0.9f}) {
    SamplingParams sampling;
    sampling.temperature = temperature;
    sampling.seed = 1234567890123;
    const SequenceId id = backend->create_sequence(sampling);
    SampledToken first;
    PrefillOutput output;
    output.sampled = &first;
    backend->prefill(id, prompt, output);
    constexpr int kSteps = 12;
    std::vector<SampledToken> chosen(kSteps);
    backend->decode(std::vector{id}, std::vector{first.token}, kSteps, chosen, {});
    // The same text, step by step, with logits on the host.
    const SequenceId other = backend->create_sequence(sampling);
    backend->prefill(other, prompt, {});
    Sampler sampler(sampling, config.vocab_size);
    sampler.append(prompt);
    TokenId input = first.token;
    std::vector<float> logits(config.vocab_size);
    for (int step = 0; step < kSteps; ++step) {
      backend->decode(std::vector{other}, std::vector{input}, 1, {}, logits);
      sampler.append(std::span(&input, 1));
      input = sampler.sample(logits).token;
      ASSERT_EQ(chosen[step].token, input) << "step " << step << ", temperature " << temperature;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, DecodeKernel,
                         testing::Values(Shape{"tiny", 128, 4, 512, 2, 301, 8},
                                         Shape{"one_layer", 128, 4, 512, 1, 301, 8},
                                         Shape{"head_16", 128, 8, 512, 3, 1000, 4},
                                         Shape{"pythia_70m_like", 512, 8, 2048, 3, 5003, 16},
                                         Shape{"pythia_160m_like", 768, 12, 3072, 3, 5003, 16},
                                         Shape{"pythia_1b_like", 2048, 8, 8192, 2, 5003, 64},
                                         Shape{"pythia_1b4_like", 2048, 16, 8192, 2, 5003, 32},
                                         Shape{"pythia_2b8_like", 2560, 32, 10240, 2, 5003, 20},
                                         Shape{"pythia_2b8_bf16", 2560, 32, 10240, 2, 5003, 20,
                                               true, Activation::gelu_erf, DType::bfloat16},
                                         Shape{"pythia_6b9_like", 4096, 32, 16384, 1, 5003, 32},
                                         Shape{"pythia_12b_like", 5120, 40, 20480, 1, 5003, 32},
                                         Shape{"sequential", 512, 8, 2048, 3, 5003, 16, false},
                                         Shape{"sequential_tanh", 768, 12, 3072, 2, 5003, 64, false,
                                               Activation::gelu_tanh},
                                         Shape{"long_context", 512, 8, 2048, 2, 1000, 16, true,
                                               Activation::gelu_erf, DType::float16, 1500}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
