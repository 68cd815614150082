// From a dtype at run time to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// Calls `use` with a value of the 16-bit type: float16's or bfloat16's.
template <typename Use>
void with_type(DType dtype, Use&& use) {
  if (dtype == DType::float16)
    use(__half{});
  else
    use(__nv_bfloat16{});
}

}  // namespace clusterfusion::cuda
