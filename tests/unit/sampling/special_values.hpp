#pragma once

#include <limits>

namespace clusterfusion {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

}  // namespace clusterfusion
