// The extension clusterfusion._eager: each layer call on plain torch tensors as one C function.
//
// It takes tensors by PyTorch's DLPack exchange API, without owning them, and new results from a
// stock of them (result_stock.hpp). Whatever is not as usual, errors too, it leaves to the other
// way: then a function returns None, and nothing was written. It keeps to Python's stable ABI,
// knows nothing of PyTorch's, and does not hold the library but calls it.
#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <utility>

#include "eager.hpp"
#include "result_stock.hpp"

namespace clusterfusion::python {
namespace {

// What set_up() was told. Kept until the process ends; the GIL guards it.
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject* tensor = nullptr;     // torch.Tensor
  PyObject* parameter = nullptr;  // torch.nn.Parameter
  TensorMakers make;
  PyObject* is_grad_enabled = nullptr;
  PyObject* is_inference_mode_enabled = nullptr;
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
  const Owned enabled = own(PyObject_CallNoArgs(torch.is_grad_enabled));
  if (!is_true(enabled.get())) return;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tensors); ++i) {
    PyObject* tensor = PyTuple_GetItem(tensors, i);
    if (tensor == Py_None) continue;
    const Owned wanted = own(PyObject_GetAttr(tensor, torch.requires_grad));
    if (is_true(wanted.get())) throw Unusual{};
  }
}

// Makes the new results of one call.
class Results {
 public:
  Results(PyObject* like, const DLTensor& like_view, void* stream) : like_(like) {
    // What is captured must be allocated anew, in the graph's own memory.
    from_stock_ = !library->is_capturing(like_view.device, stream);
    const Owned inference = own(PyObject_CallNoArgs(torch.is_inference_mode_enabled));
    kind_.thread = PyThread_get_thread_ident();
    kind_.stream = stream;
    kind_.device = like_view.device;
    kind_.dtype = like_view.dtype;
    kind_.inference = is_true(inference.get());
  }

  Owned make(std::initializer_list<std::int64_t> shape) const {
    return make(std::span(shape.begin(), shape.size()));
  }

  Owned make(std::span<const std::int64_t> shape) const {
    if (shape.size() > ResultKind::kMaxDimensions) throw Unusual{};
    if (!from_stock_) return new_empty(torch.make, like_, shape);
    static auto& stock = *new ResultStock;  // Python is gone before static objects are
    ResultKind kind = kind_;
    kind.dimensions = shape.size();
    std::copy(shape.begin(), shape.end(), kind.sizes.begin());
    return stock.take(torch.make, kind, like_);
  }

 private:
  PyObject* like_;
  bool from_stock_;
  ResultKind kind_{};
};

template <typename... Objects>
Owned tuple_of(Objects... objects) {
  Owned tuple = own(PyTuple_New(sizeof...(objects)));
  Py_ssize_t next = 0;
  (PyTuple_SetItem(tuple.get(), next++, objects.release()), ...);
  return tuple;
}

Owned new_key_or_value(const Results& results, std::int64_t hidden,
                       const ops::LayerOptions& options) {
  const std::int64_t heads = options.num_heads;
  if (heads < 1 || hidden % heads != 0) throw Unusual{};
  return results.make({1, heads, hidden / heads});
}

Owned new_like(const Results& results, const DLTensor& tensor) {
  return results.make(std::span<const std::int64_t>(tensor.shape, tensor.ndim));
}

std::int64_t hidden_of(const ops::LayerTensors& tensors) {
  if (tensors.input.ndim < 1) throw Unusual{};
  return tensors.input.shape[tensors.input.ndim - 1];
}

Owned new_results(const Results& results, const AttentionMlpUpArguments& given) {
  const std::int64_t hidden = hidden_of(given.tensors);
  if (given.tensors.mlp_up_weight.ndim < 1) throw Unusual{};
  return tuple_of(results.make({1, hidden}), results.make({given.tensors.mlp_up_weight.shape[0]}),
                  new_key_or_value(results, hidden, given.options),
                  new_key_or_value(results, hidden, given.options));
}

Owned new_results(const Results& results, const MlpDownArguments& given) {
  return tuple_of(new_like(results, given.tensors.hidden_states));
}

Owned new_results(const Results& results, const DecoderLayerArguments& given) {
  const std::int64_t hidden = hidden_of(given.tensors);
  return tuple_of(new_like(results, given.tensors.input),
                  new_key_or_value(results, hidden, given.options),
                  new_key_or_value(results, hidden, given.options));
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
template <typename Arguments, typename Views>
Owned run(PyObject* tensors, PyObject* settings, PyObject* out,
          bool (*function)(const Arguments&, const Views&, void*) noexcept) {
  Reader in(tensors, settings);
  Arguments given;
  read(in, given);
  refuse_gradients(tensors);
  const DLTensor& first = first_of(given);
  void* stream = stream_of(first);
  Owned tuple = out == Py_None
                    ? new_results(Results(PyTuple_GetItem(tensors, 0), first, stream), given)
                    : given_results(out);
  Reader in_results(tuple.get());
  Views results;
  read(in_results, results);
  if (!in_results.at_end()) throw Unusual{};
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
  return share(Py_None).release();
}

// Calls on arrays of NumPy come here too, and are not to pay for an exception.
bool begins_with_plain_tensor(PyObject* tensors) {
  return PyTuple_Check(tensors) && PyTuple_Size(tensors) != 0 &&
         is_plain_tensor(PyTuple_GetItem(tensors, 0));
}

template <auto function>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || library == nullptr || !begins_with_plain_tensor(arguments[0])) {
    return leave_it();
  }
  try {
    return run(arguments[0], arguments[1], arguments[2], library->*function).release();
  } catch (const std::exception&) {  // Unusual, or no memory
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

PyObject* attribute(PyObject* object, const char* name) {
  return own(PyObject_GetAttrString(object, name)).release();
}

// set_up(address of EagerCalls, torch, torch.nn.Parameter). Until it has been called with a torch
// that has what is needed, every call returns None.
PyObject* set_up(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 3) throw Unusual{};
    const long long address = PyLong_AsLongLong(arguments[0]);
    PyObject* package = arguments[1];
    Torch found;
    found.tensor = attribute(package, "Tensor");
    found.parameter = share(arguments[2]).release();
    found.exchange = find_exchange(found.tensor);
    found.make.tensor = found.tensor;
    found.make.new_empty = attribute(found.tensor, "new_empty");
    found.make.split = attribute(package, "unsafe_split_with_sizes");
    found.is_grad_enabled = attribute(package, "is_grad_enabled");
    found.is_inference_mode_enabled = attribute(package, "is_inference_mode_enabled");
    found.requires_grad = own(PyUnicode_InternFromString("requires_grad")).release();
    torch = found;
    library = reinterpret_cast<const EagerCalls*>(static_cast<std::intptr_t>(address));
    return share(Py_None).release();
  } catch (const std::exception&) {
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
