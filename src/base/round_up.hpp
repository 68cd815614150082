// Rounding up to a multiple.
#pragma once

#include <cstdint>

namespace clusterfusion {

// The smallest multiple of `multiple` (above 0) that is not below `value` (0 or more).
constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) noexcept {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace clusterfusion
