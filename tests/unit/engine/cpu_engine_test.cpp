// The engine on the real CPU backend, against the float64 reference model.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"
#include "support/random_model.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::HasSubstr;

std::unique_ptr<Engine> cpu_engine(const std::shared_ptr<const Model>& model, int threads) {
  BackendOptions options;
  options.threads = threads;
  return make_engine(model, byte_tokenizer(), make_cpu_backend(model, options), "a test");
}

GenerateRequest random_request(unsigned seed) {
  GenerateRequest request;
  request.prompt_tokens = random_tokens(3 + 11 * seed, seed);
  request.max_new_tokens = 5 + 9 * seed;
  request.ignore_eos = true;
  request.sampling = {.temperature = 0.9f,
                      .top_k = 100,
                      .top_p = 0.95f,
                      .repetition_penalty = 1.2f,
                      .seed = seed,
                      .num_logprobs = 1};
  return request;
}

TEST(CpuEngine, ABatchEqualsItsMembersOneByOneForAnyNumberOfThreads) {
  std::vector<GenerateRequest> requests;
  for (unsigned seed = 0; seed < 5; ++seed) requests.push_back(random_request(seed));
  const auto batch = cpu_engine(tiny_model(), 2)->generate(requests);
  for (const int threads : {1, 3}) {
    const auto engine = cpu_engine(tiny_model(), threads);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const GenerateResult alone = engine->generate(requests[i]);
      EXPECT_EQ(alone.tokens, batch[i].tokens);
      EXPECT_EQ(alone.text, batch[i].text);
      ASSERT_EQ(alone.sampled.size(), batch[i].sampled.size());
      for (std::size_t t = 0; t < alone.sampled.size(); ++t) {
        EXPECT_EQ(alone.sampled[t].logprob, batch[i].sampled[t].logprob);
      }
    }
  }
}

TEST(CpuEngine, ScoresEqualTheReferenceModel) {
  const auto engine = cpu_engine(tiny_model(), 2);
  const std::vector<TokenId> tokens = random_tokens(70, 1);
  const ScoreResult score = engine->score(tokens);
  std::vector<float> logits(tokens.size() * kVocabSize);
  engine->logits(tokens, logits);
  const std::vector<double> expected = reference_logits(*tiny_model(), tokens);
  for (std::size_t i = 0; i < logits.size(); ++i) ASSERT_NEAR(logits[i], expected[i], 2e-3);
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
    double sum = 0;
    for (std::int64_t v = 0; v < kVocabSize; ++v) sum += std::exp(expected[i * kVocabSize + v]);
    EXPECT_NEAR(score.logprobs[i], expected[i * kVocabSize + tokens[i + 1]] - std::log(sum), 2e-3);
  }
}

TEST(CpuEngine, PerplexityOfOneWindowIsThatOfTheScore) {
  const auto engine = cpu_engine(tiny_model(), 2);
  const std::vector<TokenId> tokens = random_tokens(90, 2);
  const ScoreResult score = engine->score(tokens);
  const PerplexityResult whole =
      engine->perplexity(tokens, 0, {.context = 90, .stride = 0, .progress = {}});
  EXPECT_NEAR(whole.mean_nll, -score.total / 89, 1e-9);

  // The windows [0, 32), [32, 64), [64, 90) see of each other the one token that predicts the
  // first.
  double total = 0;
  for (const auto& [begin, count] : {std::pair{0, 32}, {31, 33}, {63, 27}}) {
    total += engine->score(std::span(tokens).subspan(begin, count)).total;
  }
  const PerplexityResult parts =
      engine->perplexity(tokens, 0, {.context = 32, .stride = 32, .progress = {}});
  EXPECT_NEAR(parts.mean_nll, -total / 89, 1e-9);
}

TEST(CpuEngine, ThreadsShareIt) {
  const auto engine = cpu_engine(tiny_model(), 2);
  std::vector<GenerateResult> results(3);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { results[i] = engine->generate(random_request(i)); });
  }
  for (std::thread& thread : threads) thread.join();
  for (unsigned i = 0; i < 3; ++i) {
    EXPECT_EQ(results[i].tokens, engine->generate(random_request(i)).tokens);
  }
}

TEST(CpuEngine, NamesTheTensorThatIsNotFinite) {
  ModelConfig config = small_config();
  config.vocab_size = kVocabSize;
  const auto model = make_random_model(config);
  const DLTensor& bias = model->weights().layers[0][LayerTensor::mlp_up_bias];
  static_cast<float*>(bias.data)[3] = std::numeric_limits<float>::quiet_NaN();
  const auto engine = cpu_engine(model, 1);
  expect_error(ErrorKind::non_finite,
               testing::AllOf(HasSubstr("the checkpoint is damaged: tensor layers.0.mlp_up.bias"),
                              HasSubstr("[3]")),
               [&] { engine->generate(random_request(1)); });
  EXPECT_GT(engine->measure_read_ceiling(), 0);
}

}  // namespace
}  // namespace clusterfusion
