// The integers by which top-p counts probabilities.
#pragma once

#include <cstdint>

#include "sampling/host_device.hpp"

namespace clusterfusion {

// exp(score) 2^40 for a score <= 0, rounded to an integer that lies at most 0.51 from it (its true
// value is known to 2^-51 of itself); the same on every device. 2^40 for 0, 0 from -28.42 on.
// On the host; a kernel calls weight_with() with its own arithmetic.
std::uint64_t weight_of(float score) noexcept;

// The recipe: exp(score) = 2^n exp(r), |r| <= log(2) / 2, by the Taylor polynomial of degree 12.
// Arithmetic::multiply and Arithmetic::add round each result to the nearest float64. They are not
// plain operators, because a compiler may fuse those, on one device and not on another.
template <typename Arithmetic>
CF_HOST_DEVICE inline std::uint64_t weight_with(float score) noexcept {
  constexpr float kLowest = -28.42f;  // below, exp(score) 2^40 < 0.5
  constexpr double kLog2E = 1.4426950408889634;
  // log(2) in two parts; a small integer times the first is exact.
  constexpr double kLog2High = 6.93147180369123816490e-01;
  constexpr double kLog2Low = 1.90821492927058770002e-10;
  constexpr double kCoefficients[] = {// 1 / 11! down to 1 / 0!
                                      1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                      1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                      1.0 / 6,        0.5,           1.0,          1.0};
  if (!(score > kLowest)) return 0;
  const double x = static_cast<double>(score);
  const int n = static_cast<int>(Arithmetic::add(Arithmetic::multiply(x, kLog2E), -0.5));
  double r = Arithmetic::add(x, Arithmetic::multiply(static_cast<double>(-n), kLog2High));
  r = Arithmetic::add(r, Arithmetic::multiply(static_cast<double>(-n), kLog2Low));
  double power = 1.0 / 479001600;  // 1 / 12!
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (const double coefficient : kCoefficients)
    power = Arithmetic::add(Arithmetic::multiply(power, r), coefficient);
  // n is -41 at the least. Twice the value, plus one, cut and halved: rounded.
  const double twice =
      Arithmetic::multiply(power, static_cast<double>(std::uint64_t{1} << (n + 41)));
  return static_cast<std::uint64_t>(Arithmetic::add(twice, 1.0)) >> 1;
}

}  // namespace clusterfusion
