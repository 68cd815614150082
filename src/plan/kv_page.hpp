// The size of a KV page, for every backend and every plan.
#pragma once

#include <cstdint>

namespace clusterfusion::plan {

inline constexpr std::int32_t kKvPagePositions = 64;

}  // namespace clusterfusion::plan
