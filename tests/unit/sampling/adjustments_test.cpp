// Biases, penalties and what is forbidden, against formulas written out once more.
#include "sampling/adjustments.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "clusterfusion/error.hpp"
#include "sampling/sampler.hpp"
#include "special_values.hpp"

namespace clusterfusion {
namespace {

using testing::HasSubstr;

std::vector<float> adjusted(const std::vector<float>& logits, const std::vector<TokenId>& tokens,
                            const SamplingParams& params) {
  std::vector<float> result(logits.size());
  adjust_logits(logits, tokens, std::ssize(tokens), params, result);
  return result;
}

// Token by token, in the order of the definition.
std::vector<float> expected(const std::vector<float>& logits, const std::vector<TokenId>& tokens,
                            const SamplingParams& params) {
  std::vector<float> result = logits;
  std::map<TokenId, float> counts;
  const std::set<TokenId> seen(tokens.begin(), tokens.end());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (static_cast<std::int64_t>(i) >= params.num_prompt_tokens) ++counts[tokens[i]];
  }
  for (TokenId token = 0; token < std::ssize(logits); ++token) {
    float& logit = result[static_cast<std::size_t>(token)];
    for (const TokenBias& biased : params.logit_bias) {
      if (biased.token == token) logit += biased.bias;
    }
    if (seen.contains(token)) {
      logit = logit < 0 ? logit * params.repetition_penalty : logit / params.repetition_penalty;
    }
    if (counts.contains(token)) {
      logit += -(counts[token] * params.frequency_penalty + params.presence_penalty);
    }
    // Would the last n tokens then stand there twice?
    const std::int64_t n = params.no_repeat_ngram_size;
    std::vector<TokenId> longer = tokens;
    longer.push_back(token);
    for (std::int64_t at = 0; n > 0 && at + n < std::ssize(longer); ++at) {
      if (std::equal(longer.end() - n, longer.end(), longer.begin() + at)) logit = -kInf;
    }
  }
  return result;
}

TEST(Adjustments, EqualTheirDefinitions) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 3000; ++round) {
    const int vocab = 1 + static_cast<int>(random() % 12);
    std::vector<float> logits(static_cast<std::size_t>(vocab));
    for (float& logit : logits) logit = 3 * normal(random);
    std::vector<TokenId> tokens(random() % 20);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % vocab);
    SamplingParams params;
    params.num_prompt_tokens = static_cast<std::int64_t>(random() % 8);
    if (random() % 2) params.repetition_penalty = 1.5f;
    if (random() % 2) params.frequency_penalty = normal(random);
    if (random() % 2) params.presence_penalty = normal(random);
    params.no_repeat_ngram_size = static_cast<std::int32_t>(random() % 5);
    if (random() % 2) params.logit_bias = {{static_cast<TokenId>(random() % vocab), 2.5f}};
    ASSERT_EQ(adjusted(logits, tokens, params), expected(logits, tokens, params)) << round;
  }
}

TEST(Adjustments, KeepFiniteLogitsFiniteAndForbiddenOnesForbidden) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  SamplingParams params;
  params.logit_bias = {{0, 100}, {1, -100}, {2, 100}};
  EXPECT_EQ(adjusted({kLargest, -kLargest, -kInf}, {}, params),
            (std::vector<float>{kLargest, -kLargest, -kInf}));
}

TEST(Suppression, EndsAtItsPosition) {
  SamplingParams params;
  params.suppressed_tokens = {1};
  params.suppressed_until = 2;
  Sampler sampler(params, 3);
  const std::vector<float> logits{1, 3, 2};
  for (const TokenId token : {2, 2, 1, 1}) {
    EXPECT_EQ(sampler.sample(logits).token, token);
    sampler.append(std::vector<TokenId>{0});
  }
  sampler.truncate(1);
  EXPECT_EQ(sampler.sample(logits).token, 2);
}

TEST(DrawableVocabulary, IsAllThatIsDrawn) {
  const std::vector<float> logits{1, 2, 5, 3, 9};
  for (const float temperature : {0.0f, 1.0f, 5.0f}) {
    for (std::uint64_t seed = 0; seed < 200; ++seed) {
      SamplingParams all{.temperature = temperature, .seed = seed};
      SamplingParams some = all;
      some.drawable_vocab_size = 3;
      const SampledToken token = Sampler(some, 5).sample(logits);
      EXPECT_LT(token.token, 3);
      const std::vector<float> shorter(logits.begin(), logits.begin() + 3);
      EXPECT_EQ(token.token, Sampler(all, 3).sample(shorter).token) << "as if there were no more";
      some.drawable_vocab_size = 99;
      EXPECT_EQ(Sampler(some, 5).sample(logits).token, Sampler(all, 5).sample(logits).token);
    }
  }
  // Log-probabilities are the model's own.
  SamplingParams params{.num_logprobs = 1};
  params.drawable_vocab_size = 3;
  const SampledToken token = Sampler(params, 5).sample(logits);
  EXPECT_EQ(token.token, 2);
  EXPECT_EQ(token.top[0].token, 4);
  EXPECT_EQ(token.logprob, score_target(logits, 2).logprob);
}

TEST(Sampler, SaysThatEveryTokenIsForbidden) {
  SamplingParams params;
  params.no_repeat_ngram_size = 1;
  Sampler sampler(params, 2);
  sampler.append(std::vector<TokenId>{0, 1});
  try {
    sampler.sample(std::vector<float>{1, 2});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    EXPECT_THAT(error.what(), HasSubstr("no token is left to choose at position 2"));
  }
}

}  // namespace
}  // namespace clusterfusion
