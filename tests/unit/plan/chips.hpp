#pragma once

#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {

// Multiprocessors and bytes of shared memory for a block.
inline constexpr DeviceLimits kHopper{132, 227 * 1024};
inline constexpr DeviceLimits kBlackwell{170, 99 * 1024};

}  // namespace clusterfusion::plan
