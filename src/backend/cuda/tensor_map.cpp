#include "backend/cuda/tensor_map.hpp"

#include <fmt/ranges.h>

#include <array>

#include "backend/cuda/driver_function.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

CUtensorMap make_box_map(const BoxMap& map) {
  static const auto encode =
      driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  constexpr std::array<std::uint32_t, 5> kSteps{1, 1, 1, 1, 1};
  CUtensorMap encoded;
  const CUresult result = encode(
      &encoded,
      map.dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      static_cast<std::uint32_t>(map.sizes.size()), const_cast<void*>(map.data), map.sizes.data(),
      map.strides.data(), map.box.data(), kSteps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, map.swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, ErrorKind::internal,
          "the driver makes no map of a tensor of [{}] elements in boxes of [{}]: error {}",
          fmt::join(map.sizes, ", "), fmt::join(map.box, ", "), static_cast<int>(result));
  return encoded;
}

}  // namespace clusterfusion::cuda
