#include "sampling/filters.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <vector>

#include "special_values.hpp"

namespace clusterfusion {
namespace {

using testing::ElementsAre;

std::vector<Candidate> filter(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<Candidate> kept =
      filter_candidates(logits, *std::max_element(logits.begin(), logits.end()), params);
  std::sort(kept.begin(), kept.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return kept;
}

std::vector<TokenId> kept_tokens(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<TokenId> tokens;
  for (const Candidate& candidate : filter(logits, params)) tokens.push_back(candidate.token);
  return tokens;
}

// The same filters in the plainest way: float64, sorted from the start.
std::vector<TokenId> reference_tokens(const std::vector<float>& logits,
                                      const SamplingParams& params) {
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
  const double maximum = logits[order[0]];
  const auto probability = [&](TokenId token) {
    return std::exp((logits[token] - maximum) / params.temperature);
  };
  if (params.top_k > 0 && params.top_k < std::ssize(order)) {
    const float last = logits[order[params.top_k - 1]];
    std::erase_if(order, [&](TokenId token) { return logits[token] < last; });
  }
  double total = 0;
  for (const TokenId token : order) total += probability(token);
  double before = 0;
  std::vector<TokenId> kept;
  for (const TokenId token : order) {
    if (before >= params.top_p * total && params.top_p < 1) break;
    before += probability(token);
    if (probability(token) >= params.min_p && !std::isinf(logits[token])) kept.push_back(token);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

TEST(Filters, EqualTransformers) {
  std::ifstream file(CF_SOURCE_DIR "/tests/data/sampling_reference.json");
  ASSERT_TRUE(file) << "tests/data/sampling_reference.json is part of the project";
  const nlohmann::json reference = nlohmann::json::parse(file);
  ASSERT_GE(reference["cases"].size(), 200u);
  for (const nlohmann::json& recorded : reference["cases"]) {
    SCOPED_TRACE(recorded.dump());
    const SamplingParams params{.temperature = recorded["temperature"],
                                .top_k = recorded["top_k"],
                                .top_p = recorded["top_p"],
                                .min_p = recorded["min_p"],
                                .repetition_penalty = recorded["repetition_penalty"]};
    std::vector<float> logits;
    for (const nlohmann::json& logit : recorded["logits"]) {
      logits.push_back(logit.is_null() ? -kInf : logit.get<float>());
    }
    std::vector<float> penalized(logits.size());
    apply_repetition_penalty(logits, recorded["tokens"].get<std::vector<TokenId>>(),
                             params.repetition_penalty, penalized);
    const std::vector<Candidate> kept = filter(penalized, params);

    double sum = 0;
    for (const Candidate& candidate : kept) sum += std::exp(double{candidate.score});
    ASSERT_EQ(kept.size(), recorded["kept"].size());
    for (std::size_t i = 0; i < kept.size(); ++i) {
      EXPECT_EQ(kept[i].token, recorded["kept"][i].get<TokenId>());
      const double expected = recorded["probabilities"][i];
      EXPECT_NEAR(std::exp(double{kept[i].score}) / sum, expected, 1e-5 * expected + 1e-12);
    }
  }
}

TEST(Filters, EqualAPlainImplementationOnRandomLogits) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (int round = 0; round < 300; ++round) {
    const int vocab = std::uniform_int_distribution(1, round % 50 == 0 ? 60'000 : 600)(random);
    std::vector<float> logits(vocab);
    const float spread = std::array{0.01f, 1.0f, 3.0f, 10.0f}[random() % 4];
    for (float& logit : logits) logit = spread * normal(random);
    const SamplingParams params{
        .temperature = std::array{0.3f, 1.0f, 2.0f}[random() % 3],
        .top_k = std::array{0, 1, 5, 40, 500, 100'000}[random() % 6],
        .top_p = std::array{1e-6f, 0.3f, 0.9f, 0.999f, 1.0f}[random() % 5],
        .min_p = std::array{0.0f, 1e-4f, 0.1f, 0.9f}[random() % 4],
    };
    ASSERT_EQ(kept_tokens(logits, params), reference_tokens(logits, params))
        << "round " << round << ", vocab " << vocab << ", top_k " << params.top_k << ", top_p "
        << params.top_p << ", min_p " << params.min_p;
  }
}

TEST(TopK, KeepsTiesWithTheLast) {
  EXPECT_THAT(kept_tokens({1, 3, 2, 3, 2, 0}, {.temperature = 1, .top_k = 3}),
              ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(kept_tokens({1, 3, 2, 3, 2, 0}, {.temperature = 1, .top_k = 1}), ElementsAre(1, 3));
}

TEST(TopK, MayExceedTheVocabulary) {
  EXPECT_THAT(kept_tokens({0, 1, 2}, {.temperature = 1, .top_k = 3}), ElementsAre(0, 1, 2));
  EXPECT_THAT(kept_tokens({0, 1, 2}, {.temperature = 1, .top_k = 1000}), ElementsAre(0, 1, 2));
}

TEST(TopP, KeepsTheShortestPrefixWithTiesById) {
  const std::vector<float> uniform(4, 0.0f);
  EXPECT_THAT(kept_tokens(uniform, {.temperature = 1, .top_p = 0.25f}), ElementsAre(0));
  EXPECT_THAT(kept_tokens(uniform, {.temperature = 1, .top_p = 0.2500001f}), ElementsAre(0, 1));
  EXPECT_THAT(kept_tokens(uniform, {.temperature = 1, .top_p = 0.75f}), ElementsAre(0, 1, 2));
  EXPECT_THAT(kept_tokens(uniform, {.temperature = 1, .top_p = 1.0f}), ElementsAre(0, 1, 2, 3));
}

TEST(TopP, CountsOnlyWhatTopKLeft) {
  // Of the two likeliest, one alone holds half: enough for top_p = 0.5, not of the whole.
  EXPECT_THAT(kept_tokens({0, 0, -0.1f, -0.1f}, {.temperature = 1, .top_k = 2, .top_p = 0.5f}),
              ElementsAre(0));
}

TEST(MinP, IsRelativeToTheLikeliestAfterTemperature) {
  const float half = std::log(0.49f);
  EXPECT_THAT(kept_tokens({0, half}, {.temperature = 1, .min_p = 0.5f}), ElementsAre(0));
  EXPECT_THAT(kept_tokens({0, half}, {.temperature = 2, .min_p = 0.5f}), ElementsAre(0, 1));
  EXPECT_THAT(kept_tokens({5, 5, 4}, {.temperature = 1, .min_p = 1}), ElementsAre(0, 1));
}

TEST(Filters, ForbiddenTokensAreNeverKept) {
  const SamplingParams everything{.temperature = 1};
  EXPECT_THAT(kept_tokens({-kInf, 0, -kInf}, everything), ElementsAre(1));
  EXPECT_THAT(kept_tokens({-kInf, 0, -kInf}, {.temperature = 1, .top_k = 2}), ElementsAre(1));
  EXPECT_THAT(kept_tokens({-kInf, 0, 0}, {.temperature = 1, .top_p = 0.999f}), ElementsAre(1, 2));
}

TEST(Filters, SurviveExtremeTemperaturesAndLogits) {
  constexpr float kHuge = std::numeric_limits<float>::max();
  EXPECT_THAT(kept_tokens({1, 2, 3}, {.temperature = 1e-6f, .top_p = 0.9f}), ElementsAre(2));
  EXPECT_THAT(kept_tokens({1, 2, 3}, {.temperature = 1e6f, .min_p = 0.99f}), ElementsAre(0, 1, 2));
  EXPECT_THAT(kept_tokens({1, 2, 3}, {.temperature = std::numeric_limits<float>::denorm_min()}),
              ElementsAre(2));
  EXPECT_THAT(kept_tokens({-kHuge, kHuge}, {.temperature = 1, .top_p = 0.5f}), ElementsAre(1));
}

TEST(RepetitionPenalty, DividesAboveZeroMultipliesBelowAndCountsOnce) {
  const std::vector<float> logits{2, -2, 0, 4, -kInf};
  const std::vector<TokenId> tokens{0, 1, 0, 2, 4, 1};
  std::vector<float> penalized(5);
  apply_repetition_penalty(logits, tokens, 2, penalized);
  EXPECT_THAT(penalized, ElementsAre(1, -4, 0, 4, -kInf));
}

TEST(RepetitionPenalty, StaysFinite) {
  constexpr float kHuge = std::numeric_limits<float>::max();
  const std::vector<float> logits{1e10f, -1e10f};
  const std::vector<TokenId> tokens{0, 1};
  std::vector<float> penalized(2);
  apply_repetition_penalty(logits, tokens, 1e-38f, penalized);
  EXPECT_FLOAT_EQ(penalized[0], kHuge);
  apply_repetition_penalty(logits, tokens, kHuge, penalized);
  EXPECT_FLOAT_EQ(penalized[1], -kHuge);
}

}  // namespace
}  // namespace clusterfusion
