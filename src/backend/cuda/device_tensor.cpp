#include "backend/cuda/device_tensor.hpp"

#include <array>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory.hpp"

namespace clusterfusion::cuda {

std::shared_ptr<DLTensor> make_device_tensor(std::int64_t rows, std::int64_t columns) {
  struct Owner {
    DeviceMemory memory;
    std::array<std::int64_t, 2> shape;
    DLTensor tensor{};
  };
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  auto owner = std::make_shared<Owner>();
  owner->memory = DeviceMemory(rows * columns * 4, "an activation");
  owner->shape = {rows, columns};
  DLTensor& tensor = owner->tensor;
  tensor.data = owner->memory.as<void>();
  tensor.device = {kDLCUDA, device};
  tensor.ndim = 2;
  tensor.dtype = {kDLFloat, 32, 1};
  tensor.shape = owner->shape.data();
  return {owner, &tensor};
}

}  // namespace clusterfusion::cuda
