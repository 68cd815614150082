// Where the new token goes, as the streaming layer kernel finds it when it runs.
#pragma once

#include <cstdint>

namespace clusterfusion::cuda {

// Of LayerParams: the number that the host gave, or the one in device memory.
template <typename Inputs>
__device__ __forceinline__ int position_of(const Inputs& inputs) {
  if (inputs.device_position == nullptr) return static_cast<int>(inputs.position);
  return *static_cast<volatile const std::int32_t*>(inputs.device_position);
}

// Whether the caches of these LayerParams have such a row. A position on
// the device has been checked by nobody.
template <typename Shape>
__device__ __forceinline__ bool is_position(const Shape& shape, int position) {
  return position >= 0 && position < shape.max_positions;
}

}  // namespace clusterfusion::cuda
