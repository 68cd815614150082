// Tensors that are views into something larger: whether their elements share memory.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

namespace clusterfusion::ops {

// The distance in elements between neighbours along an axis of a tensor, which may leave its
// strides out.
std::int64_t stride_of(const DLTensor& tensor, int axis);

// From a tensor's first element to behind its last, in elements, if its last dimension has no gaps
// and its other dimensions are nested: all that lies along the inner ones fits between two
// neighbours along an outer one, in whatever order these are. Then no two elements share memory.
// 0 for any other.
std::int64_t nested_extent(const DLTensor& tensor);

// Whether an element of one shares memory with one of the other. Both are nested, with the same
// dtype, shape and strides.
bool nested_overlap(const DLTensor& a, const DLTensor& b);

}  // namespace clusterfusion::ops
