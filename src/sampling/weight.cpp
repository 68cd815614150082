#include "sampling/weight.hpp"

namespace clusterfusion {
namespace {

// This file is compiled with -ffp-contract=off, so these stay apart when they are inlined.
struct HostArithmetic {
  static double multiply(double a, double b) noexcept { return a * b; }
  static double add(double a, double b) noexcept { return a + b; }
};

}  // namespace

std::uint64_t weight_of(float score) noexcept { return weight_with<HostArithmetic>(score); }

}  // namespace clusterfusion
