// Checks tensors one after the other against the first.
#pragma once

#include <dlpack/dlpack.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "clusterfusion/model.hpp"

namespace clusterfusion::ops {

// Sizes of a tensor's dimensions, and what they stand for: {2560, "hidden"}.
struct Dimension {
  std::int64_t size;
  const char* meaning;
};
using Shape = std::initializer_list<Dimension>;

// How strictly a shape is meant.
enum class Leading {
  none,  // exactly these dimensions
  ones,  // further dimensions of 1 may come before them
};

// Every method throws what clusterfusion/ops.hpp promises, with the tensor's name; all give the
// address of the first element. Names must outlive the checker.
class TensorChecker {
 public:
  // `first` gives the device and the 16-bit dtype of all, and its last dimension is the hidden
  // size, unless `hidden_size` is not 0: then that is. It is yet to be read or written itself.
  TensorChecker(const DLTensor& first, const char* name, std::int64_t hidden_size);

  DLDevice device() const noexcept { return device_; }
  DType dtype() const noexcept { return dtype_; }
  std::int64_t hidden_size() const noexcept { return hidden_size_; }

  // 16-bit tensors that are only read.
  const void* read(const DLTensor& tensor, const char* name, Shape shape,
                   Leading leading = Leading::none);
  // 16-bit tensors that are written.
  void* write(const DLTensor& tensor, const char* name, Shape shape,
              Leading leading = Leading::none);
  // float32 and int32, at any multiple of 4 bytes.
  const float* read_float32(const DLTensor& tensor, const char* name, Shape shape);
  const std::int32_t* read_int32(const DLTensor& tensor, const char* name, Shape shape);

  // A 16-bit tensor that is written, of any strides that are nested (ops/strided.hpp). Two such
  // must have the same shape and strides, and may lie between each other; nothing else may. They
  // must outlive the checker.
  void* write_nested(const DLTensor& tensor, const char* name, Shape shape);
  // int32 [rows, columns] whose rows may lie apart.
  const std::int32_t* read_int32_rows(const DLTensor& tensor, const char* name, Shape shape);

  // Nothing written may overlap anything else.
  void require_no_overlap() const;

 private:
  struct Span {
    const std::byte* begin;
    const std::byte* end;
    const char* name;
    bool written;
    const DLTensor* nested;  // or null, where all memory between begin and end is its
  };
  static constexpr std::size_t kMaxTensors = 28;

  const std::byte* add(const DLTensor& tensor, const char* name, DLDataType dtype,
                       std::uintptr_t alignment, Shape shape, Leading leading, bool written);

  void require_kind(const DLTensor& tensor, const char* name, DLDataType dtype, Shape shape,
                    Leading leading) const;
  // For a tensor that looks wrong at first sight: says what is wrong with it, if anything is.
  void require_all(const DLTensor& tensor, const char* name, DLDataType dtype,
                   std::uintptr_t alignment, Shape shape, Leading leading) const;

  DLDevice device_{};
  DType dtype_ = DType::float16;
  std::int64_t hidden_size_ = 0;
  const char* first_name_;
  std::array<Span, kMaxTensors> spans_;
  std::size_t count_ = 0;
};

// Whether there is a tensor at all: one without elements may have no data, and is there all the
// same (torch.empty(0)).
bool is_given(const DLTensor& tensor);

// "[1, 2560]"
std::string shape_text(const DLTensor& tensor);

}  // namespace clusterfusion::ops
