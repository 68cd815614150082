#include "base/host_tensor.hpp"

#include <array>
#include <vector>

namespace clusterfusion {

std::shared_ptr<DLTensor> make_host_tensor(std::int64_t rows, std::int64_t columns) {
  struct Owner {
    std::vector<float> values;
    std::array<std::int64_t, 2> shape;
    DLTensor tensor{};
  };
  auto owner = std::make_shared<Owner>();
  owner->values.resize(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
  owner->shape = {rows, columns};
  DLTensor& tensor = owner->tensor;
  tensor.data = owner->values.data();
  tensor.device = {kDLCPU, 0};
  tensor.ndim = 2;
  tensor.dtype = {kDLFloat, 32, 1};
  tensor.shape = owner->shape.data();
  return {owner, &tensor};
}

}  // namespace clusterfusion
