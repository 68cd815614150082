// Who did what when during one decode step.
#pragma once

#include <cstdint>
#include <string_view>

namespace clusterfusion {

// One phase of work on one multiprocessor (SM). Events of one SM lie apart or one within the other.
struct TimelineEvent {
  std::int32_t sm = 0;
  std::int32_t layer = 0;     // -1: before, behind or between layers (embedding, LM head, ...)
  std::string_view phase;     // "attention", ...; stays valid as long as the program runs
  std::int64_t begin_ns = 0;  // one clock for all SMs, from any zero
  std::int64_t end_ns = 0;    // >= begin_ns
};

}  // namespace clusterfusion
