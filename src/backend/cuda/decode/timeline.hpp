// From the times that a kernel has noted to the phases of its SMs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/timeline.hpp"

namespace clusterfusion::cuda {

// Points of an epoch at which an SM notes the time: TimelinePoint, or StreamPoint of the kernel for
// many rows.
std::size_t timeline_points(bool of_rows);

// `times` of one step: [SMs, layers + 1, timeline_points(of_rows)]; 0 where a point was not passed.
std::vector<TimelineEvent> timeline_events(std::span<const std::uint64_t> times,
                                           std::int32_t sm_count, std::int32_t num_layers,
                                           bool of_rows);

}  // namespace clusterfusion::cuda
