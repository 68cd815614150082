// Proposals that are verified on a GPU: what is chosen, and what is left behind, are the bits of
// single steps.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <span>
#include <vector>

#include "gpu_fixture.hpp"
#include "support/random_interventions.hpp"

namespace clusterfusion::test {
namespace {

// Tokens by single steps, and the logits behind the last.
struct Text {
  std::vector<TokenId> prompt;
  SamplingParams sampling;
  std::vector<SampledToken> steps;
  std::vector<float> last_logits;
};

bool same(const SampledToken& a, const SampledToken& b) {
  return a.token == b.token && a.logprob == b.logprob &&
         std::ranges::equal(a.top, b.top, [](const TokenLogprob& x, const TokenLogprob& y) {
           return x.token == y.token && x.logprob == y.logprob;
         });
}

SamplingParams random_sampling(std::mt19937& random) {
  SamplingParams sampling;
  if (random() % 4 != 0) {
    sampling.temperature = 0.6f + 0.1f * static_cast<float>(random() % 8);
    sampling.seed = random();
    if (random() % 3 == 0) sampling.top_k = 20;
    if (random() % 3 == 0) sampling.top_p = 0.9f;
  }
  if (random() % 4 == 0) sampling.repetition_penalty = 1.2f;
  if (random() % 5 == 0) sampling.frequency_penalty = 0.5f;
  if (random() % 3 == 0) sampling.num_logprobs = static_cast<std::int32_t>(random() % 3);
  return sampling;
}

class Verify : public GpuTest, public testing::WithParamInterface<Shape> {
 protected:
  static constexpr int kSteps = 40;

  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    config = config_of(GetParam());
    BackendOptions options;
    options.mode = DecodeMode::throughput;
    backend = make_cuda_backend(make_random_model(config), options);
    random.seed(static_cast<unsigned>(GetParam().name.size()));
  }

  SequenceId begin(const Text& text) {
    const SequenceId id = backend->create_sequence(text.sampling);
    backend->intervene(id, interventions);
    backend->prefill(id, text.prompt, {});
    return id;
  }
  std::vector<float> logits_of_step(SequenceId id, TokenId input) {
    std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
    backend->decode({&id, 1}, {&input, 1}, 1, {}, logits);
    return logits;
  }

  Text text_by_steps(int longest) {
    Text text;
    const int length = 1 + static_cast<int>(random() % static_cast<unsigned>(longest));
    text.prompt = random_tokens(config.vocab_size, length, random());
    text.sampling = random_sampling(random);
    const SequenceId id = begin(text);
    TokenId input = 1;
    for (int step = 0; step < kSteps; ++step) {
      SampledToken sampled;
      backend->decode({&id, 1}, {&input, 1}, 1, {&sampled, 1}, {});
      input = sampled.token;
      text.steps.push_back(std::move(sampled));
    }
    text.last_logits = logits_of_step(id, input);
    backend->release_sequence(id);
    return text;
  }

  // The text's tokens from its `done`-th step on, each wrong with a chance of 1 in `odds`.
  Proposal propose(const Text& text, SequenceId id, std::size_t done, unsigned most) {
    const auto odds = static_cast<unsigned>(2 + random() % 8);
    Proposal proposal{id, {done == 0 ? 1 : text.steps[done - 1].token}};
    const std::size_t room = std::min<std::size_t>(random() % (most + 1), kSteps - done - 1);
    for (std::size_t i = 0; i < room; ++i) {
      const bool is_wrong = random() % odds == 0;
      proposal.tokens.push_back(is_wrong ? static_cast<TokenId>(random() % config.vocab_size)
                                         : text.steps[done + i].token);
    }
    return proposal;
  }

  // Texts beside each other until each has all its steps.
  void expect_the_same(std::span<const Text> texts, unsigned most) {
    std::vector<SequenceId> ids;
    std::vector<std::size_t> done(texts.size(), 0);
    for (const Text& text : texts) ids.push_back(begin(text));
    for (bool goes_on = true; goes_on;) {
      std::vector<Proposal> batch;
      std::vector<std::size_t> members;
      for (std::size_t i = 0; i < texts.size(); ++i) {
        if (done[i] == kSteps) continue;
        members.push_back(i);
        batch.push_back(propose(texts[i], ids[i], done[i], most));
      }
      goes_on = !batch.empty();
      if (!goes_on) break;
      backend->verify(batch);
      for (std::size_t b = 0; b < batch.size(); ++b) {
        const std::size_t i = members[b];
        ASSERT_GE(batch[b].chosen.size(), 1u);
        for (const SampledToken& chosen : batch[b].chosen)
          ASSERT_TRUE(same(chosen, texts[i].steps[done[i]++])) << "text " << i;
        ASSERT_EQ(backend->length(ids[i]),
                  std::ssize(texts[i].prompt) + static_cast<std::int64_t>(done[i]));
      }
    }
    for (std::size_t i = 0; i < texts.size(); ++i) {
      EXPECT_EQ(logits_of_step(ids[i], texts[i].steps.back().token), texts[i].last_logits)
          << "keys and values of text " << i;
      backend->release_sequence(ids[i]);
    }
  }

  std::vector<Text> texts(int count, int longest) {
    std::vector<Text> all;
    for (int i = 0; i < count; ++i) all.push_back(text_by_steps(longest));
    return all;
  }

  ModelConfig config;
  std::shared_ptr<const Interventions> interventions;
  std::unique_ptr<Backend> backend;
  std::mt19937 random;
};

TEST_P(Verify, OneTextHasTheBitsOfSingleSteps) {
  for (int i = 0; i < 6; ++i) expect_the_same(texts(1, 200), 15);
}

TEST_P(Verify, SeveralTextsShareSteps) { expect_the_same(texts(5, 200), 15); }

// More rows than the streaming kernel takes, in the series of kernels.
TEST_P(Verify, ManyRowsShareSteps) { expect_the_same(texts(24, 130), 12); }

TEST_P(Verify, KnowsInterventions) {
  interventions = steered(config, {0, config.num_layers - 1});
  expect_the_same(texts(3, 100), 15);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Verify, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });
// As a series of kernels, or layer by layer in single steps.
INSTANTIATE_TEST_SUITE_P(Unstreamed, Verify, testing::ValuesIn(unstreamed_shapes()),
                         [](const auto& info) { return info.param.name; });

// The kernel for one row verifies by steps.
class VerifyBySteps : public Verify {};

TEST_P(VerifyBySteps, HasTheBitsOfSingleSteps) {
  BackendOptions options;
  options.mode = DecodeMode::latency;
  backend = make_cuda_backend(make_random_model(config), options);
  EXPECT_EQ(backend->info().verify_rows, 1);
  expect_the_same(texts(3, 100), 15);
}

INSTANTIATE_TEST_SUITE_P(Shapes, VerifyBySteps, testing::Values(gpu_shapes().front()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
