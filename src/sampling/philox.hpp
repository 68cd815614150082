// The counter-based random numbers of sampling: Philox4x32-10 and the Gumbel noise made from it.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
// Plain integer arithmetic without state, so that any device can repeat it bit for bit.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "sampling/host_device.hpp"

namespace clusterfusion {

using PhiloxCounter = std::array<std::uint32_t, 4>;
using PhiloxKey = std::array<std::uint32_t, 2>;

// Ten rounds of Philox4x32: four random 32-bit words.
constexpr PhiloxCounter philox4x32_10(PhiloxCounter counter, PhiloxKey key) noexcept {
  constexpr std::uint64_t kMultiplier0 = 0xD2511F53;
  constexpr std::uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;  // golden ratio
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;  // sqrt(3) - 1
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = kMultiplier0 * counter[0];
    const std::uint64_t product1 = kMultiplier1 * counter[2];
    const auto high0 = static_cast<std::uint32_t>(product0 >> 32);
    const auto high1 = static_cast<std::uint32_t>(product1 >> 32);
    counter = {high1 ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               high0 ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key = {key[0] + kWeyl0, key[1] + kWeyl1};
  }
  return counter;
}

// The four words that belong to tokens 4 `group` .. 4 `group` + 3 at one position:
// counter = (group, 0, position low, position high), key = (seed low, seed high).
constexpr PhiloxCounter noise_words(std::uint64_t seed, std::uint64_t position,
                                    std::uint32_t group) noexcept {
  return philox4x32_10(
      {group, 0, static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32)},
      {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}

// -log(-log(u)) with u = (word + 0.5) 2^-32, which is exact in float64 and never 0 or 1; both
// logarithms in float64, the result rounded to float32. Lies in [-3.14, 22.88].
CF_HOST_DEVICE inline float gumbel_from(std::uint32_t word) noexcept {
  const double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
  return static_cast<float>(-std::log(-std::log(uniform)));
}

// What the token drawn is the largest of: logit / temperature + noise, in float64, so that it needs
// to know nothing of the other tokens and is the same number on every device.
CF_HOST_DEVICE inline double noisy_score(float logit, float temperature,
                                         std::uint32_t word) noexcept {
  return static_cast<double>(logit) / static_cast<double>(temperature) +
         static_cast<double>(gumbel_from(word));
}

}  // namespace clusterfusion
