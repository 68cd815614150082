// The rotary table against the formula in long double: what is rounded is rounded once.
#include "plan/rotary_table.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace clusterfusion::plan {
namespace {

// Half a unit in the last place of numbers up to 1, and a little for float64's own rounding of the
// angle at far positions.
void expect_rounded_once(float got, long double want, std::int64_t position) {
  const long double bound = 0x1p-25L + 0x1p-52L * static_cast<long double>(position);
  EXPECT_LE(std::abs(got - want), bound) << "position " << position;
}

TEST(RotaryTable, IsTheFormulaRoundedOnce) {
  for (const double theta : {10000.0, 500000.0, 37.5}) {
    for (const std::int64_t dim : {2, 10, 20, 64, 256}) {
      LayerSpec spec;
      spec.rotary_dim = dim;
      spec.rope_theta = theta;
      const RotaryTable table(spec);
      ASSERT_EQ(table.pairs(), static_cast<std::size_t>(dim / 2));
      for (const std::int64_t position : {0, 1, 2, 63, 511, 2047, 100000}) {
        for (std::size_t pair = 0; pair < table.pairs(); ++pair) {
          const long double frequency =
              std::pow(static_cast<long double>(theta), -2.0L * pair / dim);
          const auto [cos, sin] = table.turn(position, pair);
          expect_rounded_once(cos, std::cos(position * frequency), position);
          expect_rounded_once(sin, std::sin(position * frequency), position);
        }
      }
    }
  }
}

TEST(RotaryTable, IsEmptyWithoutRotation) { EXPECT_EQ(RotaryTable(LayerSpec()).pairs(), 0u); }

}  // namespace
}  // namespace clusterfusion::plan
