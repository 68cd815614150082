// What a device's memory can give at best.
#pragma once

#include <cstdint>

namespace clusterfusion::cuda {

// Bytes per second at which bulk copies by ticket sweep `bytes` of device memory into shared memory
// of all SMs: the best of several chunk sizes and passes.
double measure_read_ceiling(const char* data, std::int64_t bytes);

}  // namespace clusterfusion::cuda
