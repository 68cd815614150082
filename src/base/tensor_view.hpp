// Small questions about a DLTensor, the one tensor view of the project.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

inline std::optional<DType> dtype_of(const DLTensor& tensor) noexcept {
  const DLDataType type = tensor.dtype;
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 16) return DType::float16;
  if (type.code == kDLBfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == kDLFloat && type.bits == 32) return DType::float32;
  return std::nullopt;
}

inline DLDataType to_dl(DType dtype) noexcept {
  switch (dtype) {
    case DType::float16: return {kDLFloat, 16, 1};
    case DType::bfloat16: return {kDLBfloat, 16, 1};
    case DType::float32: break;
  }
  return {kDLFloat, 32, 1};
}

inline std::int64_t num_elements(const DLTensor& tensor) noexcept {
  std::int64_t count = 1;
  for (int axis = 0; axis < tensor.ndim; ++axis) count *= tensor.shape[axis];
  return count;
}

inline std::int64_t num_bytes(const DLTensor& tensor) noexcept {
  return num_elements(tensor) * ((tensor.dtype.bits * tensor.dtype.lanes + 7) / 8);
}

inline const std::byte* data_of(const DLTensor& tensor) noexcept {
  return static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
}

inline bool same_device(DLDevice a, DLDevice b) noexcept {
  return a.device_type == b.device_type && (a.device_type == kDLCPU || a.device_id == b.device_id);
}

inline bool same_dtype(DLDataType a, DLDataType b) noexcept {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Row-major, without gaps.
inline bool is_contiguous(const DLTensor& tensor) noexcept {
  if (tensor.strides == nullptr) return true;
  std::int64_t step = 1;
  bool contiguous = true;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] == 0) return true;
    if (tensor.shape[axis] != 1 && tensor.strides[axis] != step) contiguous = false;
    step *= tensor.shape[axis];
  }
  return contiguous;
}

inline bool is_present(const DLTensor& tensor) noexcept { return tensor.data != nullptr; }

}  // namespace clusterfusion
