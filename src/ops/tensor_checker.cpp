#include "ops/tensor_checker.hpp"

#include <fmt/ranges.h>

#include <span>
#include <vector>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "ops/strided.hpp"

namespace clusterfusion::ops {
namespace {

// Bulk copies and vector loads of the kernels; a power of two, as all alignments.
constexpr std::uintptr_t kAlignment = 16;

std::string device_text(DLDevice device) {
  if (device.device_type == kDLCPU) return "cpu";
  if (device.device_type == kDLCUDA) return fmt::format("cuda:{}", device.device_id);
  return fmt::format("DLPack device type {}", static_cast<int>(device.device_type));
}

std::string dtype_text(DLDataType type) {
  static constexpr const char* kCodes[] = {"int",    "uint",    "float", "opaque",
                                           "bfloat", "complex", "bool"};
  // Codes that follow, of DLPack 1.1, whose names tell the bits.
  static constexpr const char* kFloat8[] = {
      "float8_e3m4",     "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn",
      "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",    "float8_e8m0fnu"};
  constexpr std::size_t kFirst = std::size(kCodes);
  std::string text = fmt::format("DLPack type {} of {} bits", type.code, type.bits);
  if (type.code < kFirst) {
    text = fmt::format("{}{}", kCodes[type.code], type.bits);
  } else if (type.code - kFirst < std::size(kFloat8)) {
    text = kFloat8[type.code - kFirst];
  }
  return type.lanes == 1 ? text : fmt::format("{}x{}", text, type.lanes);
}

bool has_shape(const DLTensor& tensor, Shape shape, Leading leading) {
  const int extra = tensor.ndim - static_cast<int>(shape.size());
  if (extra < 0 || (extra > 0 && leading == Leading::none)) return false;
  for (int axis = 0; axis < extra; ++axis) {
    if (tensor.shape[axis] != 1) return false;
  }
  int axis = extra;
  for (const Dimension& dimension : shape) {
    if (tensor.shape[axis++] != dimension.size) return false;
  }
  return true;
}

void require_shape(const DLTensor& tensor, const char* name, Shape shape, Leading leading) {
  if (has_shape(tensor, shape, leading)) return;
  std::vector<std::int64_t> sizes;
  std::vector<const char*> meanings;
  for (const Dimension& dimension : shape) {
    sizes.push_back(dimension.size);
    meanings.push_back(dimension.meaning);
  }
  fail(ErrorKind::invalid_argument, "{}: expected shape [{}] ({}), found {}", name,
       fmt::join(sizes, ", "), fmt::join(meanings, ", "), shape_text(tensor));
}

// How many elements a row-major tensor of this shape has; 0 for any other. In one pass: each call
// has twenty tensors.
std::int64_t count_row_major(const DLTensor& tensor, Shape shape, Leading leading) {
  int axis = tensor.ndim;
  if (axis < static_cast<int>(shape.size())) return 0;
  std::int64_t count = 1;
  for (const Dimension* dimension = shape.end(); dimension != shape.begin();) {
    const std::int64_t size = tensor.shape[--axis];
    const bool is_next = tensor.strides == nullptr || tensor.strides[axis] == count || size == 1;
    if (size != (--dimension)->size || !is_next) return 0;
    count *= size;
  }
  if (axis > 0 && leading == Leading::none) return 0;
  while (axis > 0) {
    if (tensor.shape[--axis] != 1) return 0;
  }
  return count;
}

// Bytes past the last multiple of `alignment`.
std::uintptr_t misalignment(const std::byte* address, std::uintptr_t alignment) {
  return reinterpret_cast<std::uintptr_t>(address) & (alignment - 1);
}

void require_present(const DLTensor& tensor, const char* name) {
  require(is_given(tensor), ErrorKind::wrong_type, "{}: expected a tensor, found none", name);
}

void require_alignment(const DLTensor& tensor, const char* name, std::uintptr_t alignment) {
  const std::uintptr_t off = misalignment(data_of(tensor), alignment);
  require(off == 0, ErrorKind::invalid_argument,
          "{}: expected an address that is a multiple of {} bytes, found one {} bytes past it; "
          "pass a copy",
          name, alignment, off);
}

std::string strides_text(const DLTensor& tensor) {
  return fmt::format("[{}]", fmt::join(std::span(tensor.strides, tensor.ndim), ", "));
}

}  // namespace

bool is_given(const DLTensor& tensor) {
  return tensor.data != nullptr || (tensor.ndim > 0 && num_elements(tensor) == 0);
}

std::string shape_text(const DLTensor& tensor) {
  return fmt::format("[{}]", fmt::join(std::span(tensor.shape, tensor.ndim), ", "));
}

TensorChecker::TensorChecker(const DLTensor& first, const char* name, std::int64_t hidden_size)
    : device_(first.device), first_name_(name) {
  require_present(first, name);
  if (device_.device_type != kDLCPU && device_.device_type != kDLCUDA) {
    fail(ErrorKind::unsupported, "{}: expected a tensor in CPU or CUDA memory, found one on {}",
         name, device_text(device_));
  }
  const std::optional<DType> dtype = dtype_of(first);
  if (dtype != DType::float16 && dtype != DType::bfloat16) {
    fail(ErrorKind::wrong_type, "{}: expected dtype float16 or bfloat16, found {}", name,
         dtype_text(first.dtype));
  }
  dtype_ = *dtype;
  if (first.ndim < 1 || first.shape[first.ndim - 1] < 1) {
    fail(ErrorKind::invalid_argument, "{}: expected shape [..., hidden], found {}", name,
         shape_text(first));
  }
  hidden_size_ = hidden_size != 0 ? hidden_size : first.shape[first.ndim - 1];
}

const std::byte* TensorChecker::add(const DLTensor& tensor, const char* name, DLDataType dtype,
                                    std::uintptr_t alignment, Shape shape, Leading leading,
                                    bool written) {
  const std::byte* begin = data_of(tensor);
  const std::int64_t elements = count_row_major(tensor, shape, leading);
  if (tensor.data == nullptr || !same_device(tensor.device, device_) ||
      !same_dtype(tensor.dtype, dtype) || elements == 0 || misalignment(begin, alignment) != 0 ||
      count_ == kMaxTensors) {
    require_all(tensor, name, dtype, alignment, shape, leading);
  }
  spans_[count_++] = {begin, begin + elements * (dtype.bits / 8), name, written, nullptr};
  return begin;
}

void TensorChecker::require_kind(const DLTensor& tensor, const char* name, DLDataType dtype,
                                 Shape shape, Leading leading) const {
  require_present(tensor, name);
  if (!same_device(tensor.device, device_)) {
    fail(ErrorKind::invalid_argument, "{}: expected device {}, as {} has, found {}", name,
         device_text(device_), first_name_, device_text(tensor.device));
  }
  if (!same_dtype(tensor.dtype, dtype)) {
    fail(ErrorKind::wrong_type, "{}: expected dtype {}{}, found {}", name, dtype_text(dtype),
         same_dtype(dtype, to_dl(dtype_)) ? fmt::format(", as {} has", first_name_) : "",
         dtype_text(tensor.dtype));
  }
  require_shape(tensor, name, shape, leading);
}

void TensorChecker::require_all(const DLTensor& tensor, const char* name, DLDataType dtype,
                                std::uintptr_t alignment, Shape shape, Leading leading) const {
  require_kind(tensor, name, dtype, shape, leading);
  if (!is_contiguous(tensor)) {
    fail(ErrorKind::invalid_argument,
         "{}: expected a contiguous row-major tensor, found strides {} for shape {}; pass a "
         "contiguous copy",
         name, strides_text(tensor), shape_text(tensor));
  }
  require_alignment(tensor, name, alignment);
  require(count_ < kMaxTensors, ErrorKind::internal, "more than {} tensors in one call",
          kMaxTensors);
}

const void* TensorChecker::read(const DLTensor& tensor, const char* name, Shape shape,
                                Leading leading) {
  return add(tensor, name, to_dl(dtype_), kAlignment, shape, leading, false);
}

void* TensorChecker::write(const DLTensor& tensor, const char* name, Shape shape, Leading leading) {
  return const_cast<std::byte*>(add(tensor, name, to_dl(dtype_), kAlignment, shape, leading, true));
}

const float* TensorChecker::read_float32(const DLTensor& tensor, const char* name, Shape shape) {
  return reinterpret_cast<const float*>(
      add(tensor, name, {kDLFloat, 32, 1}, alignof(float), shape, Leading::ones, false));
}

const std::int32_t* TensorChecker::read_int32(const DLTensor& tensor, const char* name,
                                              Shape shape) {
  return reinterpret_cast<const std::int32_t*>(
      add(tensor, name, {kDLInt, 32, 1}, alignof(std::int32_t), shape, Leading::ones, false));
}

void* TensorChecker::write_nested(const DLTensor& tensor, const char* name, Shape shape) {
  require_kind(tensor, name, to_dl(dtype_), shape, Leading::none);
  const std::int64_t extent = nested_extent(tensor);
  if (extent == 0) {
    fail(ErrorKind::invalid_argument,
         "{}: expected a last dimension without gaps, and others of which the inner ones fit "
         "between two neighbours along an outer one, found strides {} for shape {}",
         name, strides_text(tensor), shape_text(tensor));
  }
  require_alignment(tensor, name, kAlignment);
  const std::byte* begin = data_of(tensor);
  spans_[count_++] = {begin, begin + extent * size_of(dtype_), name, true, &tensor};
  return const_cast<std::byte*>(begin);
}

const std::int32_t* TensorChecker::read_int32_rows(const DLTensor& tensor, const char* name,
                                                   Shape shape) {
  require_kind(tensor, name, {kDLInt, 32, 1}, shape, Leading::none);
  const std::int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  const std::int64_t row_stride = rows == 1 ? columns : stride_of(tensor, 0);
  if (row_stride < 0 || (columns != 1 && stride_of(tensor, 1) != 1)) {
    fail(ErrorKind::invalid_argument,
         "{}: expected rows without gaps, found strides {} for shape {}; pass a contiguous copy",
         name, strides_text(tensor), shape_text(tensor));
  }
  require_alignment(tensor, name, alignof(std::int32_t));
  const std::byte* begin = data_of(tensor);
  const std::int64_t extent = (rows - 1) * row_stride + columns;
  spans_[count_++] = {begin, begin + extent * 4, name, false, nullptr};
  return reinterpret_cast<const std::int32_t*>(begin);
}

void TensorChecker::require_no_overlap() const {
  const std::span all(spans_.data(), count_);
  for (const Span& written : all) {
    if (!written.written) continue;
    for (const Span& other : all) {
      if (written.end <= other.begin || other.end <= written.begin) continue;
      const bool is_between = written.nested != nullptr && other.nested != nullptr &&
                              !nested_overlap(*written.nested, *other.nested);
      require(is_between || &written == &other, ErrorKind::invalid_argument,
              "{}: expected memory of its own, because it is written, found that it overlaps {}",
              written.name, other.name);
    }
  }
}

}  // namespace clusterfusion::ops
