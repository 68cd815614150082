#include "torch_api.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>

#include "base/tensor_view.hpp"

namespace clusterfusion::python {
namespace {

// A library that is in the process since torch was imported: nothing is loaded here.
void* loaded_library(const char* name) {
  void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) throw Unusual{};
  return library;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  static_assert(std::is_function_v<std::remove_pointer_t<Function>>);
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

template <typename Function>
void need(void* library, const char* name, Function& function) {
  if (!find(library, name, function)) throw Unusual{};
}

// What PyTorch calls a dtype, a kind of device or a layout.
std::int32_t number(void* library, const char* name) {
  std::int32_t (*function)() = nullptr;
  need(library, name, function);
  return function();
}

PyObject* attribute(PyObject* object, const char* name) {
  return own(PyObject_GetAttrString(object, name)).release();
}

// The newest version of the exchange API that this code knows.
const DLPackExchangeAPI* find_exchange(PyObject* tensor_type) {
  const Owned capsule = own(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  const auto* header = static_cast<const DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) {
    header = header->prev_api;
  }
  if (header == nullptr) throw Unusual{};
  const auto* exchange = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (exchange->dltensor_from_py_object_no_sync == nullptr ||
      exchange->current_work_stream == nullptr) {
    throw Unusual{};
  }
  return exchange;
}

std::span<const std::int64_t> sizes_of(const DLTensor& tensor) {
  return {tensor.shape, static_cast<std::size_t>(tensor.ndim)};
}

}  // namespace

TorchApi::TorchApi(PyObject* package, PyObject* parameter_type,
                   std::span<PyObject* const> samples) {
  tensor_type_ = attribute(package, "Tensor");
  parameter_type_ = share(parameter_type).release();
  new_empty_ = attribute(tensor_type_, "new_empty");
  is_inference_mode_ = attribute(package, "is_inference_mode_enabled");
  requires_grad_ = own(PyUnicode_InternFromString("requires_grad")).release();
  exchange_ = find_exchange(tensor_type_);
  find_functions();
  find_handle(samples);
  if (!std::all_of(samples.begin(), samples.end(),
                   [&](PyObject* sample) { return agrees(sample) && can_be_cut(sample); })) {
    throw Unusual{};
  }
}

void TorchApi::find_functions() {
  void* const core = loaded_library("libtorch_cpu.so");
  need(core, "aoti_torch_get_data_ptr", data_);
  need(core, "aoti_torch_get_dim", dim_);
  need(core, "aoti_torch_get_sizes", sizes_);
  need(core, "aoti_torch_get_strides", strides_);
  need(core, "aoti_torch_get_dtype", dtype_);
  need(core, "aoti_torch_get_device_type", device_type_);
  need(core, "aoti_torch_get_device_index", device_index_);
  need(core, "aoti_torch_get_layout", layout_);
  need(core, "aoti_torch__reinterpret_tensor", reinterpret_);
  need(core, "aoti_torch_delete_tensor_object", delete_);
  need(core, "aoti_torch_grad_mode_is_enabled", is_grad_enabled_);
  float16_ = number(core, "aoti_torch_dtype_float16");
  bfloat16_ = number(core, "aoti_torch_dtype_bfloat16");
  float32_ = number(core, "aoti_torch_dtype_float32");
  int32_ = number(core, "aoti_torch_dtype_int32");
  cpu_ = number(core, "aoti_torch_device_type_cpu");
  cuda_ = number(core, "aoti_torch_device_type_cuda");
  strided_ = number(core, "aoti_torch_layout_strided");
  // PyObject* THPVariable_Wrap(at::TensorBase&&), or of older ones (const at::TensorBase&). Such a
  // name says what the function takes, so one with other arguments is not found.
  void* const python = loaded_library("libtorch_python.so");
  if (!find(python, "_Z16THPVariable_WrapON2at10TensorBaseE", wrap_)) {
    need(python, "_Z16THPVariable_WrapRKN2at10TensorBaseE", wrap_);
  }
}

// An at::Tensor is a pointer to an implementation, whose address Tensor._cdata tells. It follows an
// object's header, in older torches behind a flag.
void TorchApi::find_handle(std::span<PyObject* const> samples) {
  const Owned size = own(PyObject_GetAttrString(tensor_type_, "__basicsize__"));
  const auto holds = [&](PyObject* sample, std::ptrdiff_t offset) {
    const std::ptrdiff_t end = offset + static_cast<std::ptrdiff_t>(sizeof(void*));
    if (!is_plain(sample) || PyLong_AsLongLong(size.get()) < end) return false;
    const Owned implementation = own(PyObject_GetAttrString(sample, "_cdata"));
    const void* found = *reinterpret_cast<void**>(reinterpret_cast<char*>(sample) + offset);
    return found != nullptr && found == PyLong_AsVoidPtr(implementation.get());
  };
  for (const std::size_t offset : {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)}) {
    handle_offset_ = static_cast<std::ptrdiff_t>(offset);
    if (!samples.empty() && std::all_of(samples.begin(), samples.end(), [&](PyObject* sample) {
          return holds(sample, handle_offset_);
        })) {
      return;
    }
  }
  throw Unusual{};
}

// Whether view() says what the exchange API says.
bool TorchApi::agrees(PyObject* tensor) const {
  DLTensor expected;
  if (exchange_->dltensor_from_py_object_no_sync(tensor, &expected) != 0) return false;
  const DLTensor found = view(tensor);
  if (found.ndim != expected.ndim) return false;
  const std::span sizes = sizes_of(found);
  return data_of(found) == data_of(expected) && same_device(found.device, expected.device) &&
         same_dtype(found.dtype, expected.dtype) &&
         std::equal(sizes.begin(), sizes.end(), expected.shape) &&
         (expected.strides == nullptr
              ? is_contiguous(found)
              : std::equal(found.strides, found.strides + found.ndim, expected.strides));
}

// Whether part() makes the second row of a row-major tensor, if it has one.
bool TorchApi::can_be_cut(PyObject* tensor) const {
  const DLTensor whole = view(tensor);
  if (whole.ndim < 1 || whole.shape[0] < 2 || !is_contiguous(whole)) return true;
  const std::span sizes = sizes_of(whole).subspan(1);
  const Owned made = part(tensor, sizes, num_elements(whole) / whole.shape[0]);
  const DLTensor row = view(made.get());
  return agrees(made.get()) && std::ranges::equal(sizes, sizes_of(row)) && is_contiguous(row) &&
         data_of(row) == data_of(whole) + num_bytes(whole) / whole.shape[0];
}

DLTensor TorchApi::view(PyObject* object) const {
  if (!is_plain(object)) throw Unusual{};
  const Handle tensor = handle_of(object);
  std::int32_t layout = 0, dtype = 0, device_type = 0, device_index = 0;
  std::int64_t dim = 0;
  if ((layout_(tensor, &layout) | dtype_(tensor, &dtype) | device_type_(tensor, &device_type) |
       device_index_(tensor, &device_index) | dim_(tensor, &dim)) != 0 ||
      layout != strided_) {
    throw Unusual{};
  }
  DLTensor view{};
  if (device_type == cuda_) {
    view.device = {kDLCUDA, device_index};
  } else if (device_type == cpu_) {
    view.device = {kDLCPU, 0};
  } else {
    throw Unusual{};
  }
  if (dtype == float16_) {
    view.dtype = {kDLFloat, 16, 1};
  } else if (dtype == bfloat16_) {
    view.dtype = {kDLBfloat, 16, 1};
  } else if (dtype == float32_) {
    view.dtype = {kDLFloat, 32, 1};
  } else if (dtype == int32_) {
    view.dtype = {kDLInt, 32, 1};
  } else {
    throw Unusual{};
  }
  view.ndim = static_cast<std::int32_t>(dim);
  // The address comes last: torch prints the error of a tensor without memory, under vmap say.
  if ((sizes_(tensor, &view.shape) | strides_(tensor, &view.strides) | data_(tensor, &view.data)) !=
      0) {
    throw Unusual{};
  }
  return view;
}

Owned TorchApi::new_empty(PyObject* like, std::span<const std::int64_t> sizes) const {
  const Owned arguments = own(PyTuple_New(static_cast<Py_ssize_t>(sizes.size()) + 1));
  put_into(arguments, 0, share(like));
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    put_into(arguments, i + 1, own(PyLong_FromLongLong(sizes[i])));
  }
  return own(PyObject_CallObject(new_empty_, arguments.get()));
}

Owned TorchApi::part(PyObject* block, std::span<const std::int64_t> sizes,
                     std::int64_t first) const {
  std::array<std::int64_t, 8> strides;
  if (sizes.size() > strides.size()) throw Unusual{};
  std::int64_t step = 1;
  for (std::size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = step;
    step *= sizes[axis];
  }
  Handle made = nullptr;
  if (reinterpret_(handle_of(block), static_cast<std::int64_t>(sizes.size()), sizes.data(),
                   strides.data(), first, &made) != 0) {
    throw Unusual{};
  }
  const std::unique_ptr<void, Error (*)(Handle)> deleted_later(made, delete_);
  return own(wrap_(made));
}

void* TorchApi::stream(DLDevice device) const {
  void* stream = nullptr;
  if (device.device_type == kDLCPU) return stream;
  if (exchange_->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    throw Unusual{};
  }
  return stream;
}

bool TorchApi::is_inference_mode() const {
  return own(PyObject_CallNoArgs(is_inference_mode_)).get() == Py_True;
}

bool TorchApi::requires_grad(PyObject* tensor) const {
  return own(PyObject_GetAttr(tensor, requires_grad_)).get() == Py_True;
}

}  // namespace clusterfusion::python
