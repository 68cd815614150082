// Maps of tensors in global memory, by which bulk copies find boxes of them
// (ptx/tensor_copy.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <span>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

struct BoxMap {
  DType dtype = DType::float16;            // a 16-bit type
  const void* data = nullptr;              // a multiple of 16 bytes
  std::span<const std::uint64_t> sizes;    // in elements, the innermost first
  std::span<const std::uint64_t> strides;  // in bytes, of all but the innermost; multiples of 16
  std::span<const std::uint32_t> box;      // in elements, up to 256 each
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
};

// Errors: internal, with the sizes, if the driver makes no such map.
CUtensorMap make_box_map(const BoxMap& map);

}  // namespace clusterfusion::cuda
