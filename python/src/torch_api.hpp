// PyTorch as the extension _eager knows it, without PyTorch's headers.
//
// Tensors are looked at by the C functions that PyTorch keeps stable for models compiled ahead of
// time (aoti_torch_*, declared in its torch/csrc/inductor/aoti_torch/c/shim.h): half the time of
// its DLPack exchange API, which counts references and takes the GIL. To those functions a tensor
// is the address of an at::Tensor. Where an object of Python's holds one is not laid down, and no
// stable function makes such an object of an at::Tensor. So both are looked for, and what is found
// is tried on samples beside the exchange API, before it is used at all.
#pragma once

#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace clusterfusion::python {

class TorchApi {
 public:
  TorchApi() = default;  // of no torch: it has no plain tensors

  // `package`: the module torch. `samples`: plain tensors of several shapes and dtypes, on the CPU.
  // Throws Unusual if this torch has not what is needed, or anything that it says of a sample
  // differs from what its exchange API says. Keeps what it needs until the process ends.
  TorchApi(PyObject* package, PyObject* parameter_type, std::span<PyObject* const> samples);

  // Whether an object is a torch.Tensor or a torch.nn.Parameter: neither a subclass, whose meaning
  // is not known here, nor anything else.
  bool is_plain(PyObject* object) const {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor_type_ || type == parameter_type_;
  }

  // What a tensor is, as long as nobody changes it, which PyTorch's own operators assume too.
  // Throws Unusual for an object that is no plain tensor, and for a tensor that is no plain memory
  // of the CPU or of CUDA, or of another dtype than float16, bfloat16, float32 and int32.
  DLTensor view(PyObject* object) const;

  // Where a plain tensor begins, in the memory that its storage has now; null if it has none.
  const std::byte* begin(PyObject* tensor) const {
    void* data = nullptr;
    return data_(handle_of(tensor), &data) == 0 ? static_cast<const std::byte*>(data) : nullptr;
  }

  // like.new_empty(*sizes): modes of torch may make something else of it.
  Owned new_empty(PyObject* like, std::span<const std::int64_t> sizes) const;

  // A row-major tensor of its own in the memory of the plain tensor `block`, from the element
  // `first` on. It has its own version counter, and is no view to autograd.
  Owned part(PyObject* block, std::span<const std::int64_t> sizes, std::int64_t first) const;

  // The stream that torch works on, in this thread; null on the CPU.
  void* stream(DLDevice device) const;

  // In this thread.
  bool is_grad_enabled() const { return is_grad_enabled_(); }
  bool is_inference_mode() const;

  bool requires_grad(PyObject* tensor) const;

 private:
  using Handle = void*;  // AtenTensorHandle, an at::Tensor*
  using Error = std::int32_t;
  template <typename Answer>
  using Question = Error (*)(Handle tensor, Answer* answer);

  Handle handle_of(PyObject* tensor) const {
    return reinterpret_cast<char*>(tensor) + handle_offset_;
  }
  void find_functions();
  void find_handle(std::span<PyObject* const> samples);
  bool agrees(PyObject* tensor) const;
  bool can_be_cut(PyObject* tensor) const;

  const DLPackExchangeAPI* exchange_ = nullptr;
  PyObject* tensor_type_ = nullptr;
  PyObject* parameter_type_ = nullptr;
  PyObject* new_empty_ = nullptr;  // of torch.Tensor
  PyObject* is_inference_mode_ = nullptr;
  PyObject* requires_grad_ = nullptr;  // that name

  std::ptrdiff_t handle_offset_ = 0;  // in an object
  Question<void*> data_ = nullptr;
  Question<std::int64_t> dim_ = nullptr;
  Question<std::int64_t*> sizes_ = nullptr, strides_ = nullptr;
  Question<std::int32_t> dtype_ = nullptr, device_type_ = nullptr, device_index_ = nullptr,
                         layout_ = nullptr;
  Error (*reinterpret_)(Handle tensor, std::int64_t dim, const std::int64_t* sizes,
                        const std::int64_t* strides, std::int64_t first, Handle* made) = nullptr;
  Error (*delete_)(Handle tensor) = nullptr;
  PyObject* (*wrap_)(Handle tensor) = nullptr;  // may leave the handle empty
  bool (*is_grad_enabled_)() = nullptr;
  std::int32_t float16_ = 0, bfloat16_ = 0, float32_ = 0, int32_ = 0, cpu_ = 0, cuda_ = 0,
               strided_ = 0;
};

}  // namespace clusterfusion::python
