// What the GPU chooses against what the CPU's Sampler makes of the same logits, and against the
// distribution that it should have.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "gpu_fixture.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::test {
namespace {

constexpr int kBatch = 8;
constexpr int kCalls = 2;  // of decode(), so that one goes on where another ended
constexpr int kSteps = 12;

// Half of them plain temperature, a few greedy, the others every mixture of filters.
SamplingParams params_of(int number) {
  constexpr float kTemperatures[] = {0.3f, 0.7f, 1.0f, 1.7f};
  SamplingParams params;
  params.seed = static_cast<std::uint64_t>(number) * 0x9e3779b97f4a7c15u + 1;
  params.temperature = number % 25 == 0 ? 0.0f : kTemperatures[number / 2 % 4];
  if (number % 3 == 1) params.drawable_vocab_size = 200;  // in the decode kernel and the sampler's
  if (number % 11 == 5) params.presence_penalty = 0.5f;   // which the host computes
  if (number % 2 == 0) return params;
  const int mixture = number / 2 % 32;
  if (mixture & 1) params.top_k = 5 + number % 40;
  if (mixture & 2) params.top_p = 0.9f;
  if (mixture & 4) params.min_p = 0.05f;
  if (mixture & 8) params.repetition_penalty = 1.3f;
  if (mixture & 16) params.num_logprobs = 2;
  return params;
}

// Prompts end on either side of a page's end.
std::vector<TokenId> prompt_of(int number, std::int64_t vocab) {
  return random_tokens(vocab, 1 + number * 11 % 150, static_cast<unsigned>(number));
}

// What one sequence was given: the token after the prompt, those of each decode() call, and the
// logits after the last one's input.
struct Choices {
  std::vector<SampledToken> tokens;
  std::vector<float> last_logits;
};

SampledToken prefill(Backend& backend, SequenceId id, std::span<const TokenId> prompt,
                     std::span<float> last_logits = {}) {
  SampledToken first;
  PrefillOutput output;
  output.sampled = &first;
  output.last_logits = last_logits;
  backend.prefill(id, prompt, output);
  return first;
}

// A batch of sequences of unlike lengths and settings, many tokens at a time.
std::vector<Choices> chosen_by_gpu(Backend& backend, std::int64_t vocab, int first_number) {
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  std::vector<Choices> choices(kBatch);
  for (int b = 0; b < kBatch; ++b) {
    ids.push_back(backend.create_sequence(params_of(first_number + b)));
    choices[b].tokens.push_back(prefill(backend, ids[b], prompt_of(first_number + b, vocab)));
    inputs.push_back(choices[b].tokens[0].token);
  }
  std::vector<float> logits(kBatch * width);
  for (int call = 0; call < kCalls; ++call) {
    std::vector<SampledToken> sampled(kBatch * kSteps);
    backend.decode(ids, inputs, kSteps, sampled, logits);
    for (int b = 0; b < kBatch; ++b) {
      for (int step = 0; step < kSteps; ++step)
        choices[b].tokens.push_back(sampled[step * kBatch + b]);
      inputs[b] = choices[b].tokens.back().token;
    }
  }
  for (int b = 0; b < kBatch; ++b) {
    backend.release_sequence(ids[b]);
    choices[b].last_logits.assign(logits.begin() + b * vocab, logits.begin() + (b + 1) * vocab);
  }
  return choices;
}

// One sequence alone, token by token; the GPU computes logits and the host's Sampler chooses.
Choices chosen_by_host(Backend& backend, std::int64_t vocab, int number) {
  const auto prompt = prompt_of(number, vocab);
  const SequenceId id = backend.create_sequence(params_of(number));
  Sampler sampler(params_of(number), vocab);
  Choices choices;
  choices.last_logits.resize(static_cast<std::size_t>(vocab));
  prefill(backend, id, prompt, choices.last_logits);
  sampler.append(prompt);
  choices.tokens.push_back(sampler.sample(choices.last_logits));
  for (int step = 0; step < kCalls * kSteps; ++step) {
    const TokenId input = choices.tokens.back().token;
    backend.decode(std::vector{id}, std::vector{input}, 1, {}, choices.last_logits);
    sampler.append(std::span(&input, 1));
    choices.tokens.push_back(sampler.sample(choices.last_logits));
  }
  backend.release_sequence(id);
  return choices;
}

void compare(const Choices& gpu, const Choices& host, const SamplingParams& params) {
  for (std::size_t i = 0; i < host.tokens.size(); ++i) {
    ASSERT_EQ(gpu.tokens[i].token, host.tokens[i].token) << "token " << i;
    if (params.num_logprobs < 0) continue;
    ASSERT_NEAR(gpu.tokens[i].logprob, host.tokens[i].logprob, 1e-5) << "token " << i;
    ASSERT_EQ(gpu.tokens[i].top.size(), host.tokens[i].top.size()) << "token " << i;
    for (std::size_t rank = 0; rank < host.tokens[i].top.size(); ++rank)
      ASSERT_EQ(gpu.tokens[i].top[rank].token, host.tokens[i].top[rank].token) << "token " << i;
  }
  ASSERT_EQ(gpu.last_logits, host.last_logits);  // to the last bit
}

void compare_seeds(const Shape& shape, int count) {
  const ModelConfig config = config_of(shape);
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  for (int first = 0; first < count; first += kBatch) {
    const auto gpu = chosen_by_gpu(*backend, config.vocab_size, first);
    for (int b = 0; b < kBatch; ++b) {
      SCOPED_TRACE("setting " + std::to_string(first + b));
      const Choices host = chosen_by_host(*backend, config.vocab_size, first + b);
      compare(gpu[b], host, params_of(first + b));
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

class Sampling : public GpuTest, public testing::WithParamInterface<Shape> {};

TEST_P(Sampling, ChoosesWhatTheSamplerChooses) { compare_seeds(GetParam(), 2 * kBatch); }

INSTANTIATE_TEST_SUITE_P(Shapes, Sampling, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

using ManySeeds = GpuTest;

TEST_F(ManySeeds, ChooseWhatTheSamplerChooses) {
  compare_seeds({"tiny", 128, 4, 512, 2, 301, 8}, 1000);
}

TEST_F(ManySeeds, ChooseWhatTheSamplerChoosesInBfloat16) {
  compare_seeds(
      {"small_bf16", 256, 4, 1024, 2, 4099, 16, true, Activation::gelu_erf, DType::bfloat16}, 200);
}

// Pearson's statistic of `counts` against probabilities.
double chi_squared(std::span<const int> counts, std::span<const double> probabilities) {
  const double total = std::accumulate(counts.begin(), counts.end(), 0.0);
  double sum = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = total * probabilities[i];
    sum += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  return sum;
}

std::vector<double> softmax(std::span<const float> logits, double temperature) {
  std::vector<double> probabilities;
  for (const float logit : logits) probabilities.push_back(std::exp(logit / temperature));
  const double sum = std::accumulate(probabilities.begin(), probabilities.end(), 0.0);
  for (double& probability : probabilities) probability /= sum;
  return probabilities;
}

// How often each token follows the same text, over seeds 0, 1, ...
std::vector<int> count_choices(Backend& backend, std::int64_t vocab, float temperature,
                               std::span<const TokenId> text, int draws) {
  constexpr int kTogether = 64;
  std::vector<int> counts(static_cast<std::size_t>(vocab));
  for (int first = 0; first < draws; first += kTogether) {
    std::vector<SequenceId> ids;
    for (int b = 0; b < kTogether; ++b) {
      SamplingParams params;
      params.temperature = temperature;
      params.seed = static_cast<std::uint64_t>(first + b);
      ids.push_back(backend.create_sequence(params));
      backend.prefill(ids.back(), text.first(text.size() - 1), {});
    }
    std::vector<SampledToken> sampled(kTogether);
    backend.decode(ids, std::vector(kTogether, text.back()), 1, sampled, {});
    for (const SampledToken& token : sampled) ++counts[static_cast<std::size_t>(token.token)];
    for (const SequenceId id : ids) backend.release_sequence(id);
  }
  return counts;
}

// Seeds are fixed, so this passes always or never. The bounds are the 0.001 and 0.999 quantiles of
// the chi-squared distribution with 30 degrees of freedom: too even is as wrong as too uneven.
TEST_F(ManySeeds, FollowTheSoftmax) {
  constexpr int kVocab = 31;
  constexpr int kDraws = 16384;
  constexpr double kLowest = 11.588;
  constexpr double kHighest = 59.703;
  const ModelConfig config = config_of({"tiny", 128, 4, 512, 2, kVocab, 8});
  const auto backend = make_cuda_backend(make_random_model(config), {});
  const auto text = random_tokens(kVocab, 3, 5);
  const auto logits = decoded_logits(*backend, kVocab, text);
  for (const float temperature : {0.6f, 1.0f, 2.0f}) {
    const auto expected = softmax(std::span(logits).last(kVocab), temperature);
    ASSERT_GE(*std::min_element(expected.begin(), expected.end()) * kDraws, 5);
    const auto counts = count_choices(*backend, kVocab, temperature, text, kDraws);
    const double statistic = chi_squared(counts, expected);
    std::printf("temperature %.1f: chi-squared %.1f, 30 degrees of freedom\n", temperature,
                statistic);
    EXPECT_GT(statistic, kLowest) << "temperature " << temperature;
    EXPECT_LT(statistic, kHighest) << "temperature " << temperature;
  }
}

}  // namespace
}  // namespace clusterfusion::test
