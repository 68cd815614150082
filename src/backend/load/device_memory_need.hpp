// Whether a model fits into a device's memory, asked before anything is copied.
#pragma once

#include <cstdint>

namespace clusterfusion {

// What a backend is going to take of a device's memory.
struct DeviceMemoryNeed {
  std::int64_t weight_bytes = 0;
  std::int64_t workspace_bytes = 0;  // at most
  std::int64_t kv_page_bytes = 0;    // of kKvPagePositions positions
  std::int64_t positions = 0;        // of one sequence
};

// Errors: out_of_memory if the weights, the workspace and the KV cache of one sequence do not fit
// into `free` of `total` bytes, with all these numbers and what to do.
void require_fit(const DeviceMemoryNeed& need, std::int64_t free, std::int64_t total);

}  // namespace clusterfusion
