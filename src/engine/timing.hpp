// Decode steps under observation: how long they take, and what the device does meanwhile.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/shared_backend.hpp"

namespace clusterfusion {

// These two have the meaning and errors of their namesakes in Engine.
DecodeTiming compute_decode_timing(SharedBackend& backend, std::span<const TokenId> prompt,
                                   std::int64_t num_tokens);
std::vector<TimelineEvent> compute_timeline(SharedBackend& backend,
                                            std::span<const TokenId> prompt);

}  // namespace clusterfusion
