#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "clusterfusion/error.hpp"
#include "sampling/philox.hpp"
#include "sampling/sampler.hpp"
#include "special_values.hpp"

namespace clusterfusion {
namespace {

using testing::HasSubstr;

std::vector<float> random_logits(std::mt19937& random, int vocab, float spread) {
  std::normal_distribution<float> normal;
  std::vector<float> logits(vocab);
  for (float& logit : logits) logit = spread * normal(random);
  return logits;
}

double reference_log_probability(const std::vector<float>& logits, TokenId token) {
  long double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<long double>(logit) - logits[token]);
  return static_cast<double>(-std::log(sum));
}

template <typename Action>
void expect_error(ErrorKind kind, const char* part, Action action) {
  try {
    action();
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind);
    EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

TEST(Greedy, TakesTheLargestAndTheLowestIdOnATie) {
  Sampler sampler({}, 5);
  EXPECT_EQ(sampler.sample(std::vector<float>{1, 3, 2, 3, -kInf}).token, 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-kInf, -kInf, -kInf, -3, -kInf}).token, 3);
  EXPECT_EQ(sampler.sample(std::vector<float>{0, 0, 0, 0, 0}).token, 0);
}

TEST(Greedy, HeedsTheRepetitionPenaltyAndTruncate) {
  Sampler sampler({.repetition_penalty = 2}, 3);
  const std::vector<float> logits{1, 4, 3};
  EXPECT_EQ(sampler.sample(logits).token, 1);
  sampler.append(std::vector<TokenId>{0, 1});
  EXPECT_EQ(sampler.length(), 2);
  EXPECT_EQ(sampler.sample(logits).token, 2);
  sampler.truncate(1);
  EXPECT_EQ(sampler.length(), 1);
  EXPECT_EQ(sampler.sample(logits).token, 1);
}

// Draws `count` tokens at successive positions and compares with the wanted probabilities.
double chi_squared(const std::vector<float>& logits, SamplingParams params,
                   const std::vector<double>& expected, int count) {
  Sampler sampler(params, std::ssize(logits));
  std::vector<int> seen(logits.size());
  for (int i = 0; i < count; ++i) {
    const SampledToken sampled = sampler.sample(logits);
    ++seen[sampled.token];
    sampler.append(std::vector<TokenId>{sampled.token});
  }
  double statistic = 0;
  for (std::size_t token = 0; token < seen.size(); ++token) {
    if (expected[token] == 0) {
      EXPECT_EQ(seen[token], 0) << "token " << token << " was filtered out";
      continue;
    }
    const double difference = seen[token] - count * expected[token];
    statistic += difference * difference / (count * expected[token]);
  }
  return statistic;
}

TEST(Draw, FollowsTheSoftmax) {
  const std::vector<double> expected{0.4, 0.05, 0.2, 0.1, 0.02, 0.03, 0.1, 0.1};
  std::vector<float> logits;
  for (const double p : expected) logits.push_back(static_cast<float>(std::log(p)) + 5);
  for (const std::uint64_t seed : {0ull, 1ull, 42ull, 0xdeadbeefcafebabeull}) {
    // 24.32 is the 0.1 % point for 7 degrees of freedom.
    EXPECT_LT(chi_squared(logits, {.temperature = 1, .seed = seed}, expected, 50'000), 24.32);
  }
}

TEST(Draw, FollowsTheFilteredSoftmaxAtAnyTemperature) {
  const std::vector<float> logits{2, 0, 1, 3, -1};
  std::vector<double> expected{std::exp(1.0), 0, std::exp(0.5), std::exp(1.5), 0};
  const double sum = expected[0] + expected[2] + expected[3];
  for (double& p : expected) p /= sum;
  // 13.82 is the 0.1 % point for 2 degrees of freedom.
  EXPECT_LT(chi_squared(logits, {.temperature = 2, .top_k = 3, .seed = 5}, expected, 50'000),
            13.82);
}

TEST(Draw, IsIndependentAcrossSeedsAtOnePosition) {
  constexpr int kSeeds = 30'000;
  const std::vector<float> logits(6, 0.0f);
  std::vector<int> seen(6);
  for (int seed = 0; seed < kSeeds; ++seed) {
    Sampler sampler({.temperature = 1, .seed = static_cast<std::uint64_t>(seed)}, 6);
    ++seen[sampler.sample(logits).token];
  }
  double statistic = 0;
  for (const int count : seen) {
    statistic += (count - kSeeds / 6.0) * (count - kSeeds / 6.0) / (kSeeds / 6.0);
  }
  EXPECT_LT(statistic, 20.52);  // the 0.1 % point for 5 degrees of freedom
}

TEST(Draw, IsTheArgmaxOfScoresPlusNoise) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    const int vocab = 1 + static_cast<int>(random() % 300);
    const std::vector<float> logits = random_logits(random, vocab, 2);
    const float temperature = 0.5f + static_cast<float>(random() % 4);
    const std::uint64_t seed = (std::uint64_t{random()} << 32) | random();
    const std::vector<TokenId> history(random() % 100, 0);
    Sampler sampler({.temperature = temperature, .seed = seed}, vocab);
    sampler.append(history);

    TokenId best = -1;
    double best_score = -kInf;
    for (int token = 0; token < vocab; ++token) {
      const auto words = philox4x32_10(
          {static_cast<std::uint32_t>(token / 4), 0, static_cast<std::uint32_t>(history.size()), 0},
          {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
      const float noise =
          static_cast<float>(-std::log(-std::log((words[token % 4] + 0.5) / 4294967296.0)));
      const double score = double{logits[token]} / double{temperature} + double{noise};
      if (score > best_score) {
        best_score = score;
        best = token;
      }
    }
    ASSERT_EQ(sampler.sample(logits).token, best) << "round " << round;
  }
}

// What other tokens the filters left does not change the noise of a token.
TEST(Draw, FiltersDoNotShiftTheNoise) {
  std::mt19937 random(4);
  int same = 0;
  for (int round = 0; round < 200; ++round) {
    const std::vector<float> logits = random_logits(random, 200, 4);
    const std::uint64_t seed = random();
    const TokenId free = Sampler({.temperature = 1, .seed = seed}, 200).sample(logits).token;
    const TokenId filtered =
        Sampler({.temperature = 1, .top_k = 20, .top_p = 0.99f, .seed = seed}, 200)
            .sample(logits)
            .token;
    same += free == filtered;
  }
  EXPECT_GT(same, 150);
}

TEST(Draw, ExtremeTemperatures) {
  const std::vector<float> logits{1.0f, 1.001f, 0.5f};
  std::set<TokenId> cold;
  std::set<TokenId> hot;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    cold.insert(Sampler({.temperature = 1e-6f, .seed = seed}, 3).sample(logits).token);
    hot.insert(Sampler({.temperature = 1e6f, .seed = seed}, 3).sample(logits).token);
  }
  EXPECT_EQ(cold, (std::set<TokenId>{1}));
  EXPECT_EQ(hot, (std::set<TokenId>{0, 1, 2}));
}

TEST(Draw, OneTokenVocabulary) {
  Sampler sampler({.temperature = 1, .top_k = 5, .top_p = 0.1f, .min_p = 1}, 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-7}).token, 0);
}

TEST(Draw, LeavesTheLogitsAlone) {
  std::vector<float> logits{3, 1, 2};
  Sampler sampler({.temperature = 1, .top_k = 2, .repetition_penalty = 1.5f}, 3);
  sampler.append(std::vector<TokenId>{0});
  sampler.sample(logits);
  EXPECT_EQ(logits, (std::vector<float>{3, 1, 2}));
}

TEST(LogProbability, EqualsFloat64) {
  std::mt19937 random(9);
  for (const int vocab : {1, 2, 100, 50'304}) {
    const std::vector<float> logits = random_logits(random, vocab, 5);
    for (int i = 0; i < 20; ++i) {
      const auto token = static_cast<TokenId>(random() % vocab);
      const double expected = reference_log_probability(logits, token);
      EXPECT_NEAR(score_target(logits, token).logprob, expected, 1e-6 + 2e-7 * std::abs(expected));
    }
  }
}

TEST(LogProbability, LargeAndForbiddenLogits) {
  EXPECT_FLOAT_EQ(score_target(std::vector<float>{1e30f, 1e30f}, 0).logprob, std::log(0.5f));
  EXPECT_FLOAT_EQ(score_target(std::vector<float>{-1e30f, -1e30f}, 1).logprob, std::log(0.5f));
  EXPECT_EQ(score_target(std::vector<float>{0, -kInf}, 1).logprob, -kInf);
  EXPECT_EQ(score_target(std::vector<float>{0, -kInf}, 0).logprob, 0);
}

TEST(Logprobs, AreTheModelsOwnBeforeAnyFilter) {
  std::mt19937 random(10);
  const std::vector<float> logits = random_logits(random, 500, 3);
  Sampler sampler(
      {.temperature = 0.5f, .top_k = 7, .repetition_penalty = 1.7f, .seed = 1, .num_logprobs = 5},
      500);
  sampler.append(std::vector<TokenId>{1, 2, 3});
  const SampledToken sampled = sampler.sample(logits);
  EXPECT_NEAR(sampled.logprob, reference_log_probability(logits, sampled.token), 1e-5);
  ASSERT_EQ(sampled.top.size(), 5u);
  for (const TokenLogprob& top : sampled.top) {
    EXPECT_NEAR(top.logprob, reference_log_probability(logits, top.token), 1e-5);
  }
  for (int token = 0; token < 500; ++token) {
    const bool listed = std::any_of(sampled.top.begin(), sampled.top.end(),
                                    [&](const TokenLogprob& top) { return top.token == token; });
    EXPECT_EQ(listed, logits[token] >= logits[sampled.top.back().token]);
  }
}

TEST(Logprobs, OrderTiesByIdAndStopAtTheVocabulary) {
  Sampler sampler({.num_logprobs = 100}, 4);
  const SampledToken sampled = sampler.sample(std::vector<float>{1, 2, 1, 2});
  std::vector<TokenId> order;
  for (const TokenLogprob& top : sampled.top) order.push_back(top.token);
  EXPECT_EQ(order, (std::vector<TokenId>{1, 3, 0, 2}));
}

TEST(Logprobs, AbsentUnlessAskedFor) {
  const std::vector<float> logits{1, 2};
  EXPECT_EQ(Sampler({}, 2).sample(logits).logprob, 0);
  const SampledToken chosen = Sampler({.num_logprobs = 0}, 2).sample(logits);
  EXPECT_LT(chosen.logprob, 0);
  EXPECT_TRUE(chosen.top.empty());
}

TEST(SamplerErrors, NonFiniteLogits) {
  for (const float temperature : {0.0f, 1.0f}) {
    Sampler sampler({.temperature = temperature, .top_k = 2}, 3);
    expect_error(ErrorKind::non_finite, "the logit of token 2 is nan", [&] {
      sampler.sample(std::vector<float>{1, 2, kNan});
    });
    expect_error(ErrorKind::non_finite, "the logit of token 0 is nan", [&] {
      sampler.sample(std::vector<float>{kNan, 2, 3});
    });
    expect_error(ErrorKind::non_finite, "the logit of token 1 is inf", [&] {
      sampler.sample(std::vector<float>{1, kInf, 0});
    });
    expect_error(ErrorKind::non_finite, "all 3 logits are -inf", [&] {
      sampler.sample(std::vector<float>{-kInf, -kInf, -kInf});
    });
  }
  expect_error(ErrorKind::non_finite, "the logit of token 1 is nan", [] {
    score_target(std::vector<float>{1, kNan}, 0);
  });
}

TEST(SamplerErrors, WrongSizesAndIds) {
  Sampler sampler({}, 3);
  expect_error(ErrorKind::invalid_argument, "expected 3 logits (vocab_size), got 2", [&] {
    sampler.sample(std::vector<float>{1, 2});
  });
  expect_error(ErrorKind::out_of_range, "token 3 at index 1 is not in [0, 3)", [&] {
    sampler.append(std::vector<TokenId>{0, 3});
  });
  expect_error(ErrorKind::invalid_argument, "cannot truncate a sequence of 0 tokens to 1",
               [&] { sampler.truncate(1); });
  expect_error(ErrorKind::out_of_range, "token -1 is not in [0, 2)", [] {
    score_target(std::vector<float>{1, 2}, -1);
  });
  expect_error(ErrorKind::invalid_argument, "top_p", [] { Sampler({.top_p = 0}, 3); });
  expect_error(ErrorKind::invalid_argument, "vocab_size", [] { Sampler({}, 0); });
}

}  // namespace
}  // namespace clusterfusion
