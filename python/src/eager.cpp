// The extension clusterfusion._eager: each layer call on plain torch tensors as one C function.
//
// It takes tensors by PyTorch's DLPack exchange API, without owning them, and makes results by
// Tensor.new_empty. Whatever is not as usual, errors too, it leaves to the other way: then a
// function returns None, and nothing was written. It keeps to Python's stable ABI, knows nothing of
// PyTorch's, and does not hold the library but calls it.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>

#include "eager.hpp"

namespace clusterfusion::python {
namespace {

// Thrown where a call is to be made in the other way.
struct Unusual {};

struct Release {
  void operator()(PyObject* object) const noexcept { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// An object of Python's, or Unusual if making it failed.
Owned own(PyObject* object) {
  if (object == nullptr) throw Unusual{};
  return Owned(object);
}

// What set_up() was told. Kept until the process ends; the GIL guards it.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject* tensor = nullptr;     // torch.Tensor
  PyObject* parameter = nullptr;  // torch.nn.Parameter
  PyObject* new_empty = nullptr;  // torch.Tensor.new_empty
  PyObject* is_grad_enabled = nullptr;
  PyObject* requires_grad = nullptr;  // that name
};
Torch torch;
const EagerCalls* library = nullptr;

bool is_true(PyObject* object) { return object == Py_True; }

bool is_type(PyObject* object, PyTypeObject& type) { return Py_TYPE(object) == &type; }

// Neither a subclass, whose meaning is not known here, nor anything else.
bool is_plain_tensor(PyObject* object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor || type == torch.parameter;
}

// The view lasts as long as nobody changes the tensor, which PyTorch's own operators assume too.
DLTensor view_of(PyObject* object) {
  DLTensor view;
  if (!is_plain_tensor(object)) throw Unusual{};
  if (torch.exchange->dltensor_from_py_object_no_sync(object, &view) != 0) throw Unusual{};
  return view;
}

// The stream that torch works on.
void* stream_of(const DLTensor& tensor) {
  const DLDevice device = tensor.device;
  void* stream = nullptr;
  if (device.device_type == kDLCPU) return stream;
  if (torch.exchange->current_work_stream(device.device_type, device.device_id, &stream) != 0) {
    throw Unusual{};
  }
  return stream;
}

// Reads the arguments of one tuple, then of another. None is a tensor that is not there.
class Reader {
 public:
  explicit Reader(PyObject* tuple, PyObject* second = nullptr) : second_(second) { begin(tuple); }

  bool at_end() const { return next_ == size_ && second_ == nullptr; }

  DLTensor tensor(const char*) {
    PyObject* object = next();
    return object == Py_None ? DLTensor{} : view_of(object);
  }

  ops::Position position(const char*) {
    PyObject* object = next();
    if (is_type(object, PyLong_Type)) return {integer_of(object), {}};
    return {0, view_of(object)};
  }

  std::int64_t integer(const char*) { return integer_of(next()); }

  std::optional<std::int64_t> optional_integer(const char*) {
    PyObject* object = next();
    if (object == Py_None) return std::nullopt;
    return integer_of(object);
  }

  double number(const char*) {
    PyObject* object = next();
    if (!is_type(object, PyFloat_Type)) throw Unusual{};
    return PyFloat_AsDouble(object);
  }

  bool boolean(const char*) {
    PyObject* object = next();
    if (!is_type(object, PyBool_Type)) throw Unusual{};
    return is_true(object);
  }

  Activation activation(const char*) {
    PyObject* object = next();
    if (!is_type(object, PyUnicode_Type)) throw Unusual{};
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    Activation activation{};
    if (text == nullptr ||
        !library->find_activation({text, static_cast<std::size_t>(size)}, activation)) {
      throw Unusual{};
    }
    return activation;
  }

 private:
  void begin(PyObject* tuple) {
    if (tuple == nullptr || !PyTuple_Check(tuple)) throw Unusual{};
    tuple_ = tuple;
    size_ = PyTuple_Size(tuple);
    next_ = 0;
  }

  PyObject* next() {
    if (next_ == size_) begin(std::exchange(second_, nullptr));
    PyObject* object = PyTuple_GetItem(tuple_, next_++);
    if (object == nullptr) throw Unusual{};  // an empty tuple
    return object;
  }

  static std::int64_t integer_of(PyObject* object) {
    if (!is_type(object, PyLong_Type)) throw Unusual{};
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) throw Unusual{};
    return value;
  }

  PyObject* tuple_ = nullptr;
  PyObject* second_;
  Py_ssize_t size_ = 0;
  Py_ssize_t next_ = 0;
};

void refuse_gradients(PyObject* tensors) {
  const Owned enabled = own(PyObject_CallFunctionObjArgs(torch.is_grad_enabled, nullptr));
  if (!is_true(enabled.get())) return;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    if (tensor == Py_None) continue;
    const Owned wanted = own(PyObject_GetAttr(tensor, torch.requires_grad));
    if (is_true(wanted.get())) throw Unusual{};
  }
}

// like.new_empty(*shape)
Owned new_result(PyObject* like, std::initializer_list<std::int64_t> shape) {
  std::array<Owned, 3> sizes;  // those that are left end the list of arguments
  std::size_t count = 0;
  for (const std::int64_t size : shape) sizes.at(count++) = own(PyLong_FromLongLong(size));
  return own(PyObject_CallFunctionObjArgs(torch.new_empty, like, sizes[0].get(), sizes[1].get(),
                                          sizes[2].get(), nullptr));
}

Owned new_result(PyObject* like, const DLTensor& tensor) {
  switch (tensor.ndim) {
    case 2: return new_result(like, {tensor.shape[0], tensor.shape[1]});
    case 3: return new_result(like, {tensor.shape[0], tensor.shape[1], tensor.shape[2]});
    default: throw Unusual{};
  }
}

template <typename... Results>
Owned tuple_of(Results... results) {
  Owned tuple = own(PyTuple_New(sizeof...(results)));
  Py_ssize_t next = 0;
  (PyTuple_SetItem(tuple.get(), next++, results.release()), ...);
  return tuple;
}

Owned new_key_or_value(PyObject* like, std::int64_t hidden, const ops::LayerOptions& options) {
  const std::int64_t heads = options.num_heads;
  if (heads < 1 || hidden % heads != 0) throw Unusual{};
  return new_result(like, {1, heads, hidden / heads});
}

std::int64_t hidden_of(const ops::LayerTensors& tensors) {
  if (tensors.input.ndim < 1) throw Unusual{};
  return tensors.input.shape[tensors.input.ndim - 1];
}

Owned new_results(PyObject* like, const AttentionMlpUpArguments& given) {
  const std::int64_t hidden = hidden_of(given.tensors);
  if (given.tensors.mlp_up_weight.ndim < 1) throw Unusual{};
  return tuple_of(
      new_result(like, {1, hidden}), new_result(like, {given.tensors.mlp_up_weight.shape[0]}),
      new_key_or_value(like, hidden, given.options), new_key_or_value(like, hidden, given.options));
}

Owned new_results(PyObject* like, const MlpDownArguments& given) {
  return tuple_of(new_result(like, given.tensors.hidden_states));
}

Owned new_results(PyObject* like, const DecoderLayerArguments& given) {
  const std::int64_t hidden = hidden_of(given.tensors);
  return tuple_of(new_result(like, given.tensors.input),
                  new_key_or_value(like, hidden, given.options),
                  new_key_or_value(like, hidden, given.options));
}

const DLTensor& first_of(const MlpDownArguments& given) { return given.tensors.hidden_states; }
template <typename Arguments>
const DLTensor& first_of(const Arguments& given) {
  return given.tensors.input;
}

Owned given_results(PyObject* out) {
  if (!PyTuple_Check(out) && !PyList_Check(out)) throw Unusual{};
  return own(PySequence_Tuple(out));
}

// A call with its tensors, its settings, and either the results' sequence or None.
template <typename Arguments, typename Results>
Owned run(PyObject* tensors, PyObject* settings, PyObject* out,
          bool (*function)(const Arguments&, const Results&, void*) noexcept) {
  Reader in(tensors, settings);
  Arguments given;
  read(in, given);
  refuse_gradients(tensors);
  Owned tuple =
      out == Py_None ? new_results(PyTuple_GetItem(tensors, 0), given) : given_results(out);
  Reader in_results(tuple.get());
  Results results;
  read(in_results, results);
  if (!in_results.at_end()) throw Unusual{};
  void* stream = stream_of(first_of(given));
  // No destructor may run without the GIL: a thread that Python ends does not come back from
  // waiting for it.
  PyObject* kept = tuple.release();
  PyThreadState* state = PyEval_SaveThread();
  const bool done = function(given, results, stream);
  PyEval_RestoreThread(state);
  tuple.reset(kept);
  if (!done) throw Unusual{};
  return tuple;
}

// None, unless Python is to stop.
PyObject* leave_it() {
  if (PyErr_Occurred() != nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;
    PyErr_Clear();
  }
  Py_RETURN_NONE;
}

template <auto function>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || library == nullptr) Py_RETURN_NONE;
  try {
    return run(arguments[0], arguments[1], arguments[2], library->*function).release();
  } catch (const Unusual&) {
    return leave_it();
  }
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
  if (exchange->dltensor_from_py_object_no_sync == nullptr) throw Unusual{};
  return exchange;
}

// set_up(address of EagerCalls, torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled). Until it
// has been called with a torch that has what is needed, every call returns None.
PyObject* set_up(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 4) throw Unusual{};
    const long long address = PyLong_AsLongLong(arguments[0]);
    Torch found;
    found.exchange = find_exchange(arguments[1]);
    found.new_empty = own(PyObject_GetAttrString(arguments[1], "new_empty")).release();
    found.requires_grad = own(PyUnicode_InternFromString("requires_grad")).release();
    found.tensor = Py_NewRef(arguments[1]);
    found.parameter = Py_NewRef(arguments[2]);
    found.is_grad_enabled = Py_NewRef(arguments[3]);
    torch = found;
    library = reinterpret_cast<const EagerCalls*>(static_cast<std::intptr_t>(address));
    Py_RETURN_NONE;
  } catch (const Unusual&) {
    return leave_it();
  }
}

// Functions of METH_FASTCALL hide behind another type.
template <typename Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"set_up", as_method(set_up), METH_FASTCALL, nullptr},
    {"attention_mlp_up", as_method(call<&EagerCalls::attention_mlp_up>), METH_FASTCALL, nullptr},
    {"mlp_down", as_method(call<&EagerCalls::mlp_down>), METH_FASTCALL, nullptr},
    {"decoder_layer", as_method(call<&EagerCalls::decoder_layer>), METH_FASTCALL, nullptr},
    {},
};

PyModuleDef module{PyModuleDef_HEAD_INIT,
                   "_eager",
                   "The layer calls on plain torch tensors.",
                   -1,
                   methods,
                   nullptr,
                   nullptr,
                   nullptr,
                   nullptr};

}  // namespace
}  // namespace clusterfusion::python

PyMODINIT_FUNC PyInit__eager() { return PyModule_Create(&clusterfusion::python::module); }
