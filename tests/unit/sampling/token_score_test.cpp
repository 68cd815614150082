#include "sampling/token_score.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "sampling/weight.hpp"
#include "special_values.hpp"

namespace clusterfusion {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();

// Ends, zeros, neighbours, and floats of any size.
std::vector<float> awkward_floats() {
  std::vector<float> values{0.0f, -0.0f, 1.0f,  -1.0f,    kTiny,     -kTiny,
                            kInf, -kInf, 1e-3f, kLargest, -kLargest, std::nextafter(1.0f, 2.0f)};
  std::mt19937 random(3);
  while (values.size() < 2000) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (!std::isnan(value)) values.push_back(value);
  }
  return values;
}

TEST(LogitKey, OrdersAsTheFloats) {
  const std::vector<float> values = awkward_floats();
  for (const float a : values) {
    for (const float b : values) {
      ASSERT_EQ(logit_key(a) < logit_key(b), a > b) << a << " " << b;
      ASSERT_EQ(logit_key(a) == logit_key(b), a == b) << a << " " << b;
    }
  }
}

TEST(ScoreKey, OrdersAsTheScoresAndLeadsBack) {
  for (const float a : awkward_floats()) {
    const float score = -std::abs(a);
    EXPECT_EQ(score_of_key(score_key(score)), score);
    for (const float b : {0.0f, -0.0f, -kTiny, -0.7f, -28.0f, -kLargest, -kInf}) {
      ASSERT_EQ(score_key(score) < score_key(b), score > b) << score << " " << b;
      ASSERT_EQ(score_key(score) == score_key(b), score == b) << score << " " << b;
    }
  }
  EXPECT_EQ(score_key(0.0f), score_key(-0.0f));
}

TEST(PenalizedLogit, DividesAboveZeroMultipliesBelowAndStaysFinite) {
  EXPECT_EQ(penalized_logit(3.0f, 1.5f), 2.0f);
  EXPECT_EQ(penalized_logit(-3.0f, 1.5f), -4.5f);
  EXPECT_EQ(penalized_logit(0.0f, 1.5f), 0.0f);
  EXPECT_EQ(penalized_logit(-kInf, 0.5f), -kInf);
  EXPECT_EQ(penalized_logit(kLargest, 0.5f), kLargest);
  EXPECT_EQ(penalized_logit(-kLargest, 2.0f), -kLargest);
}

TEST(TokenScore, IsZeroForTheLargestAndMayBeInfinite) {
  EXPECT_EQ(token_score(7.5f, 7.5f, 0.3f), 0.0f);
  EXPECT_EQ(token_score(6.5f, 7.5f, 2.0f), -0.5f);
  EXPECT_EQ(token_score(-kLargest, kLargest, 1.0f), -kInf);
  EXPECT_EQ(token_score(-kInf, 0.0f, 1.0f), -kInf);
}

TEST(TiesNeeded, IsTheFewestThatReach) {
  std::mt19937_64 random(4);
  for (int round = 0; round < 2000; ++round) {
    const std::uint64_t before = random() % 1000;
    const std::uint64_t weight = 1 + random() % 50;
    const std::uint64_t ties = 1 + random() % 300;
    const std::uint64_t wanted = before + 1 + random() % (ties * weight);
    std::uint64_t expected = 1;
    while (before + expected * weight < wanted) ++expected;
    ASSERT_EQ(ties_needed(before, weight, ties, [&](std::uint64_t sum) { return sum >= wanted; }),
              expected);
  }
}

// As the filters count: tokens one by one, until they hold the share.
TEST(TiesNeeded, OfEqualProbabilities) {
  const std::uint64_t weight = weight_of(0.0f);
  constexpr std::uint64_t kTies = 50'304;
  for (const float top_p : {1e-45f, 1e-6f, 0.1f, 0.25f, 0.5f, 0.9f, 0.99999994f}) {
    std::uint64_t taken = 0, expected = 0;
    do {
      taken += weight;
      ++expected;
    } while (!reaches_top_p(taken, kTies * weight, top_p));
    EXPECT_EQ(
        ties_needed(0, weight, kTies,
                    [&](std::uint64_t sum) { return reaches_top_p(sum, kTies * weight, top_p); }),
        expected);
    EXPECT_NEAR(static_cast<double>(expected), std::max(1.0, std::ceil(double{top_p} * kTies)), 1);
  }
}

}  // namespace
}  // namespace clusterfusion
