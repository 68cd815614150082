#include "sampling/philox.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace clusterfusion {
namespace {

// The known-answer vectors that Random123 publishes (tests/kat_vectors, philox4x32 10).
static_assert(philox4x32_10({0, 0, 0, 0}, {0, 0}) ==
              PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
                            {0xffffffff, 0xffffffff}) ==
              PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                            {0xa4093822, 0x299f31d0}) ==
              PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

// The same at run time, where the compiler's own arithmetic does not do the work.
TEST(Philox, KnownAnswers) {
  volatile std::uint32_t zero = 0;
  const std::uint32_t z = zero;
  const std::uint32_t ones = ~z;
  EXPECT_EQ(philox4x32_10({z, z, z, z}, {z, z}),
            (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32_10({ones, ones, ones, ones}, {ones, ones}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(
      philox4x32_10({0x243f6a88 ^ z, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
      (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, WordsComeFromSeedPositionAndGroup) {
  EXPECT_EQ(noise_words(0x299f31d0'a4093822, 0x03707344'13198a2e, 7),
            philox4x32_10({7, 0, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}));
}

TEST(Gumbel, IsFiniteAndMonotoneAtTheEnds) {
  EXPECT_NEAR(gumbel_from(0), -std::log(33 * std::log(2.0)), 1e-6);
  EXPECT_NEAR(gumbel_from(0x7fffffff), -std::log(std::log(2.0)), 1e-6);
  EXPECT_NEAR(gumbel_from(0xffffffff), 33 * std::log(2.0), 1e-5);
  EXPECT_LT(gumbel_from(0xfffffff0), gumbel_from(0xffffffff));
}

TEST(Gumbel, HasTheMomentsOfTheDistribution) {
  constexpr int kDraws = 400'000;
  constexpr double kEulerGamma = 0.57721566490153286;
  constexpr double kVariance = 1.6449340668482264;  // pi^2 / 6
  double sum = 0;
  double squares = 0;
  for (std::uint32_t group = 0; group < kDraws / 4; ++group) {
    for (const std::uint32_t word : noise_words(11, 3, group)) {
      const double noise = gumbel_from(word);
      sum += noise;
      squares += noise * noise;
    }
  }
  const double mean = sum / kDraws;
  EXPECT_NEAR(mean, kEulerGamma, 4 * std::sqrt(kVariance / kDraws));
  EXPECT_NEAR(squares / kDraws - mean * mean, kVariance, 0.02);
}

}  // namespace
}  // namespace clusterfusion
