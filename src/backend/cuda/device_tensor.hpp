// A tensor in device memory that owns it.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <memory>

namespace clusterfusion::cuda {

// float32 [rows, columns], row-major, on the current device; holds nothing yet. Errors:
// out_of_memory.
std::shared_ptr<DLTensor> make_device_tensor(std::int64_t rows, std::int64_t columns);

}  // namespace clusterfusion::cuda
