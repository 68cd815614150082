// float32 to the 16-bit types: to the nearest, ties to even; NaN stays NaN, what is too large
// becomes infinity.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cpu {

inline std::uint16_t bits_of_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::uint16_t bits_of_float16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7e00);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24, which adding 0.5 rounds to
    const std::uint32_t rounded = std::bit_cast<std::uint32_t>(magnitude + 0.5f);
    return static_cast<std::uint16_t>(sign | (rounded - std::bit_cast<std::uint32_t>(0.5f)));
  }
  const std::uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// Rounds `count` values to `dtype`, float16 or bfloat16, and stores them.
inline void narrow(DType dtype, const float* from, std::int64_t count, void* to) {
  auto* bits = static_cast<std::uint16_t*>(to);
  const auto narrow_one = dtype == DType::float16 ? bits_of_float16 : bits_of_bfloat16;
  for (std::int64_t i = 0; i < count; ++i) bits[i] = narrow_one(from[i]);
}

}  // namespace clusterfusion::cpu
