// What the filters compute for one token, and how they order tokens: the same on every device.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "sampling/host_device.hpp"

namespace clusterfusion {

// The logit of a token that has been seen: above 0 divided by `penalty`, below 0 multiplied; finite
// if it was, and -inf stays -inf.
CF_HOST_DEVICE inline float penalized_logit(float logit, float penalty) noexcept {
  constexpr float kLargest = std::numeric_limits<float>::max();
  if (std::isinf(logit)) return logit;
  const float scaled = logit < 0 ? logit * penalty : logit / penalty;
  return scaled > kLargest ? kLargest : scaled < -kLargest ? -kLargest : scaled;
}

// <= 0, in float32: one subtraction and one division. -inf for a logit too far below `maximum`.
CF_HOST_DEVICE inline float token_score(float logit, float maximum, float temperature) noexcept {
  return (logit - maximum) / temperature;
}

// Keys order tokens: the smaller, the likelier. Equal exactly where the floats are, so that 0 and
// -0 have one.
CF_HOST_DEVICE inline std::uint32_t logit_key(float logit) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(logit == 0.0f ? 0.0f : logit);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

// Of a score <= 0, and back. The sign's bit is left out, so that the first digits say much.
CF_HOST_DEVICE inline std::uint32_t score_key(float score) noexcept {
  return std::bit_cast<std::uint32_t>(score) << 1;
}
CF_HOST_DEVICE inline float score_of_key(std::uint32_t key) noexcept {
  return -std::bit_cast<float>(key >> 1);
}

// The fewest of `ties` tokens of `weight` each that, on top of `before`, reach what is wanted.
// `reached(sum)` is false for `before`, true for all of them, and never becomes false again.
template <typename Reached>
CF_HOST_DEVICE inline std::uint64_t ties_needed(std::uint64_t before, std::uint64_t weight,
                                                std::uint64_t ties, Reached reached) {
  std::uint64_t too_few = 0;
  while (ties - too_few > 1) {
    const std::uint64_t middle = too_few + (ties - too_few) / 2;
    (reached(before + middle * weight) ? ties : too_few) = middle;
  }
  return ties;
}

// Whether tokens that weigh `taken` of `total` hold `top_p` of the probability. In float64.
CF_HOST_DEVICE inline bool reaches_top_p(std::uint64_t taken, std::uint64_t total,
                                         float top_p) noexcept {
  const double wanted = static_cast<double>(top_p) * static_cast<double>(total);
  return static_cast<double>(taken) >= wanted;
}

}  // namespace clusterfusion
