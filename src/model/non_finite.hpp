// Looking for NaN and infinity.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <optional>

namespace clusterfusion {

struct NonFinite {
  std::int64_t index;  // row-major
  float value;         // NaN, infinity or minus infinity
};

// The first element of a compact float16, bfloat16 or float32 tensor that is NaN or infinite.
std::optional<NonFinite> first_non_finite(const DLTensor& tensor);

}  // namespace clusterfusion
