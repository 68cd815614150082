#include "ops/strided.hpp"

#include <algorithm>
#include <cstdlib>
#include <span>
#include <vector>

#include "base/tensor_view.hpp"

namespace clusterfusion::ops {
namespace {

struct Axis {
  std::int64_t size, stride;
};

// All but the last, those of more than one element, by falling strides.
std::vector<Axis> outer_axes(const DLTensor& tensor) {
  std::vector<Axis> axes;
  for (int axis = 0; axis + 1 < tensor.ndim; ++axis) {
    if (tensor.shape[axis] != 1) axes.push_back({tensor.shape[axis], stride_of(tensor, axis)});
  }
  std::sort(axes.begin(), axes.end(),
            [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
  return axes;
}

// Whether `distance` is less than `inner` from a sum of strides, each times less than its size in
// either direction. What the inner axes come to is less than a stride, so that of the multiples of
// it only the two around the distance count.
bool meets(std::int64_t distance, std::span<const Axis> axes, std::int64_t inner) {
  if (axes.empty()) return std::abs(distance) < inner;
  const Axis& axis = axes.front();
  const std::int64_t below = distance / axis.stride - (distance % axis.stride < 0 ? 1 : 0);
  for (const std::int64_t steps : {below, below + 1}) {
    if (std::abs(steps) < axis.size &&
        meets(distance - steps * axis.stride, axes.subspan(1), inner)) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::int64_t stride_of(const DLTensor& tensor, int axis) {
  if (tensor.strides != nullptr) return tensor.strides[axis];
  std::int64_t stride = 1;
  for (int inner = axis + 1; inner < tensor.ndim; ++inner) stride *= tensor.shape[inner];
  return stride;
}

std::int64_t nested_extent(const DLTensor& tensor) {
  const int last = tensor.ndim - 1;
  if (tensor.shape[last] != 1 && stride_of(tensor, last) != 1) return 0;
  std::int64_t extent = tensor.shape[last];
  const std::vector<Axis> axes = outer_axes(tensor);
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    if (axis->stride < extent) return 0;
    extent += (axis->size - 1) * axis->stride;
  }
  return extent;
}

bool nested_overlap(const DLTensor& a, const DLTensor& b) {
  const std::int64_t bytes = a.dtype.bits / 8;
  const std::int64_t distance = data_of(b) - data_of(a);
  // Elements that lie askew count by the bytes that they touch.
  const std::vector<Axis> axes = [&] {
    std::vector<Axis> in_bytes = outer_axes(a);
    for (Axis& axis : in_bytes) axis.stride *= bytes;
    return in_bytes;
  }();
  return meets(distance, axes, a.shape[a.ndim - 1] * bytes);
}

}  // namespace clusterfusion::ops
