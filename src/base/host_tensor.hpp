// A tensor in host memory that owns it.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <memory>

namespace clusterfusion {

// float32 [rows, columns], row-major, all zero. Errors: std::bad_alloc.
std::shared_ptr<DLTensor> make_host_tensor(std::int64_t rows, std::int64_t columns);

}  // namespace clusterfusion
