#include "sampling/weight.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "special_values.hpp"

namespace clusterfusion {
namespace {

// exp(score) 2^40 with 64 bits of mantissa.
long double exact(float score) { return std::exp(static_cast<long double>(score)) * 0x1p40L; }

TEST(Weight, IsTheExponentialToTheNearestInteger) {
  // Every 4099th float from the lowest score that weighs anything up to -2^-24.
  const auto lowest = std::bit_cast<std::uint32_t>(28.5f);
  const auto highest = std::bit_cast<std::uint32_t>(0x1p-24f);
  for (std::uint32_t bits = lowest; bits > highest; bits -= 4099) {
    const float score = -std::bit_cast<float>(bits);
    const auto weight = static_cast<long double>(weight_of(score));
    ASSERT_LE(std::abs(weight - exact(score)), 0.51L) << score;
  }
}

TEST(Weight, IsNearlyAlwaysTheNearestInteger) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-28.0f, 0.0f);
  constexpr int kScores = 200'000;
  int others = 0;
  for (int i = 0; i < kScores; ++i) {
    const float score = uniform(random);
    others += weight_of(score) != static_cast<std::uint64_t>(std::llround(exact(score)));
  }
  EXPECT_LT(others, kScores / 5000);
}

TEST(Weight, Ends) {
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  constexpr std::uint64_t kOne = std::uint64_t{1} << 40;
  EXPECT_EQ(weight_of(0.0f), kOne);
  EXPECT_EQ(weight_of(-0.0f), kOne);
  EXPECT_EQ(weight_of(-kTiny), kOne);
  EXPECT_EQ(weight_of(-28.41f), 1u);  // 0.504
  EXPECT_EQ(weight_of(-28.42f), 0u);  // 0.4996
  EXPECT_EQ(weight_of(-1e30f), 0u);
  EXPECT_EQ(weight_of(-kInf), 0u);
}

TEST(Weight, NeverGrowsAsTheScoreFalls) {
  // Neighbouring floats about the places where the power of two changes.
  for (int n = 1; n <= 81; n += 2) {
    const auto middle = std::bit_cast<std::uint32_t>(static_cast<float>(n * std::log(2.0) / 2));
    for (std::uint32_t bits = middle - 2000; bits < middle + 2000; ++bits)
      ASSERT_GE(weight_of(-std::bit_cast<float>(bits)), weight_of(-std::bit_cast<float>(bits + 1)))
          << n << " " << bits;
  }
}

}  // namespace
}  // namespace clusterfusion
