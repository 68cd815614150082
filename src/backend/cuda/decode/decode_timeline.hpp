// From the times that the decode kernel noted to events with names.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/timeline.hpp"

namespace clusterfusion::cuda {

// `times`: nanoseconds [sm_count, num_layers + 1, TimelinePoint::count] of one step, 0 where a
// point was not passed; the last epoch is the LM head's. An event ends at the point that it is
// named after.
std::vector<TimelineEvent> timeline_events(std::span<const std::uint64_t> times,
                                           std::int32_t sm_count, std::int32_t num_layers);

}  // namespace clusterfusion::cuda
