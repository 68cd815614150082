// The extension clusterfusion._eager: each layer call on plain torch tensors as one C function.
//
// It looks at tensors by PyTorch's C functions, without owning them (torch_api.hpp), and takes
// new results from blocks (result_blocks.hpp). Whatever is not as usual, errors too, it leaves to
// the other way, a function of Python's, before anything is written. It keeps to Python's stable
// ABI, includes nothing of PyTorch's, and does not hold the library but calls it.
#include "python_objects.hpp"
// Python.h comes first.
#include <dlpack/dlpack.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "eager.hpp"
#include "result_blocks.hpp"
#include "torch_api.hpp"

namespace clusterfusion::python {
namespace {

// What set_up() was told. Kept until the process ends; the GIL guards it.
TorchApi torch;
const EagerCalls* library = nullptr;
PyObject* other_way = nullptr;  // takes a call's name and its arguments

bool is_type(PyObject* object, PyTypeObject& type) { return Py_TYPE(object) == &type; }

using Arguments = std::span<PyObject* const>;

// Reads one argument after the other. None is a tensor that is not there.
class Reader {
 public:
  explicit Reader(Arguments arguments) : arguments_(arguments) {}

  bool at_end() const { return arguments_.empty(); }

  DLTensor tensor(const char*) {
    PyObject* object = next();
    return object == Py_None ? DLTensor{} : torch.view(object);
  }

  ops::Position position(const char*) {
    PyObject* object = next();
    if (is_type(object, PyLong_Type)) return {integer_of(object), {}};
    return {0, torch.view(object)};
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
    return object == Py_True;
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
  PyObject* next() {
    if (arguments_.empty()) throw Unusual{};
    PyObject* object = arguments_.front();
    arguments_ = arguments_.subspan(1);
    return object;
  }

  static std::int64_t integer_of(PyObject* object) {
    if (!is_type(object, PyLong_Type)) throw Unusual{};
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) throw Unusual{};
    return value;
  }

  Arguments arguments_;
};

void refuse_gradients(Arguments arguments) {
  for (PyObject* argument : arguments) {
    if (torch.is_plain(argument) && torch.requires_grad(argument)) throw Unusual{};
  }
}

ResultShape shape_of(const DLTensor& tensor) {
  const auto dimensions = static_cast<std::size_t>(tensor.ndim);
  if (dimensions < 1 || dimensions > ResultShape::kMaxDimensions) throw Unusual{};
  ResultShape shape{dimensions};
  std::copy_n(tensor.shape, dimensions, shape.sizes.begin());
  return shape;
}

std::int64_t hidden_of(const ops::LayerTensors& tensors) {
  if (tensors.input.ndim < 1) throw Unusual{};
  return tensors.input.shape[tensors.input.ndim - 1];
}

void add_new_key_and_value(ResultKind& kind, const ops::LayerTensors& tensors,
                           const ops::LayerOptions& options) {
  const std::int64_t hidden = hidden_of(tensors);
  const std::int64_t heads = options.num_heads;
  if (heads < 1 || hidden % heads != 0) throw Unusual{};
  const ResultShape shape{3, {1, heads, hidden / heads}};
  kind.add(shape);
  kind.add(shape);
}

void add_results(ResultKind& kind, const AttentionMlpUpArguments& given) {
  if (given.tensors.mlp_up_weight.ndim < 1) throw Unusual{};
  kind.add({2, {1, hidden_of(given.tensors)}});
  kind.add({1, {given.tensors.mlp_up_weight.shape[0]}});
  add_new_key_and_value(kind, given.tensors, given.options);
}

void add_results(ResultKind& kind, const MlpDownArguments& given) {
  kind.add(shape_of(given.tensors.hidden_states));
}

void add_results(ResultKind& kind, const DecoderLayerArguments& given) {
  kind.add(shape_of(given.tensors.input));
  add_new_key_and_value(kind, given.tensors, given.options);
}

ResultBlocks& blocks() {
  static auto& kept = *new ResultBlocks;  // Python is gone before static objects are
  return kept;
}

// The new results of one call.
class NewResults {
 public:
  template <typename Given>
  NewResults(const Given& given, PyObject* like, const DLTensor& like_view, void* stream) {
    kind_.thread = PyThread_get_thread_ident();
    kind_.stream = stream;
    kind_.device = like_view.device;
    kind_.dtype = like_view.dtype;
    kind_.inference = torch.is_inference_mode();
    add_results(kind_, given);
    // What is captured must be allocated anew, in the graph's own memory.
    set_ = library->is_capturing(like_view.device, stream) ? new_results(torch, kind_, like)
                                                           : blocks().take(torch, kind_, like);
  }

  // The results one after the other, as a Reader gives them.
  DLTensor tensor(const char*) { return set_.view(kind_, next_++); }
  Owned take_tuple() { return std::move(set_.tuple); }

 private:
  ResultKind kind_{};
  ResultSet set_;
  std::size_t next_ = 0;
};

const DLTensor& first_of(const MlpDownArguments& given) { return given.tensors.hidden_states; }
template <typename Given>
const DLTensor& first_of(const Given& given) {
  return given.tensors.input;
}

// The results that the caller has given, as a tuple.
template <typename Views>
Owned take_given(PyObject* out, Views& views) {
  if (!PyTuple_Check(out) && !PyList_Check(out)) throw Unusual{};
  Owned tuple = own(PySequence_Tuple(out));
  std::array<PyObject*, ResultKind::kMaxResults> results{};
  const auto count = static_cast<std::size_t>(PyTuple_Size(tuple.get()));
  if (count > results.size()) throw Unusual{};
  for (std::size_t i = 0; i < count; ++i) {
    results[i] = PyTuple_GetItem(tuple.get(), static_cast<Py_ssize_t>(i));
  }
  Reader in({results.data(), count});
  read(in, views);
  if (!in.at_end()) throw Unusual{};
  return tuple;
}

// A call with its tensors and settings, and then either the results' sequence or None.
template <typename Given, typename Views>
Owned run(Arguments arguments, bool (*function)(const Given&, const Views&, void*) noexcept) {
  PyObject* const out = arguments.back();
  arguments = arguments.first(arguments.size() - 1);
  Reader in(arguments);
  Given given;
  read(in, given);
  if (!in.at_end()) throw Unusual{};
  if (torch.is_grad_enabled()) refuse_gradients(arguments);
  const DLTensor& first = first_of(given);
  void* stream = torch.stream(first.device);
  Views views;
  Owned tuple;
  std::optional<NewResults> made;
  if (out == Py_None) {
    made.emplace(given, arguments.front(), first, stream);
    read(*made, views);
    tuple = made->take_tuple();
  } else {
    tuple = take_given(out, views);
  }
  // No destructor may run without the GIL: a thread that Python ends does not come back from
  // waiting for it.
  PyObject* kept = tuple.release();
  PyThreadState* state = PyEval_SaveThread();
  const bool done = function(given, views, stream);
  PyEval_RestoreThread(state);
  tuple.reset(kept);
  if (!done) throw Unusual{};
  return tuple;
}

// Forgets an error of Python's, unless Python is to stop: then this returns false.
bool forget_error() {
  if (PyErr_Occurred() == nullptr) return true;
  if (!PyErr_ExceptionMatches(PyExc_Exception)) return false;
  PyErr_Clear();
  return true;
}

PyObject* call_other_way(const char* name, Arguments arguments) {
  if (other_way == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "clusterfusion._eager has not been set up");
    return nullptr;
  }
  const auto count = static_cast<Py_ssize_t>(arguments.size());
  const Owned all = own(PyTuple_New(count + 1));
  put_into(all, 0, own(PyUnicode_FromString(name)));
  for (std::size_t i = 0; i < arguments.size(); ++i) put_into(all, i + 1, share(arguments[i]));
  return PyObject_CallObject(other_way, all.get());
}

constexpr char kAttentionMlpUp[] = "attention_mlp_up";
constexpr char kMlpDown[] = "mlp_down";
constexpr char kDecoderLayer[] = "decoder_layer";

template <const char* name, auto function>
PyObject* call(PyObject*, PyObject* const* first, Py_ssize_t count) {
  const Arguments arguments(first, static_cast<std::size_t>(count));
  try {
    // Calls on arrays of NumPy come here too, and are not to pay for an exception.
    if (library != nullptr && count > 1 && torch.is_plain(arguments.front())) {
      try {
        return run(arguments, library->*function).release();
      } catch (const std::exception&) {  // Unusual, or no memory
        if (!forget_error()) return nullptr;
      }
    }
    return call_other_way(name, arguments);
  } catch (const std::exception&) {
    return PyErr_Occurred() != nullptr ? nullptr : PyErr_NoMemory();
  }
}

// set_up(address of EagerCalls, the other way, torch, torch.nn.Parameter, a tuple of samples) ->
// whether calls can be made here. With a torch that has not what is needed, every call goes the
// other way.
PyObject* set_up(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "set_up() takes 5 arguments");
    return nullptr;
  }
  try {
    library = nullptr;
    other_way = share(arguments[1]).release();
    const long long address = PyLong_AsLongLong(arguments[0]);
    if (PyErr_Occurred() != nullptr) throw Unusual{};
    std::vector<PyObject*> samples;
    for (Py_ssize_t i = 0; i < PyTuple_Size(arguments[4]); ++i) {
      samples.push_back(PyTuple_GetItem(arguments[4], i));
    }
    torch = TorchApi(arguments[2], arguments[3], samples);
    library = reinterpret_cast<const EagerCalls*>(static_cast<std::intptr_t>(address));
  } catch (const std::exception&) {
    if (!forget_error()) return nullptr;
  }
  return PyBool_FromLong(library != nullptr);
}

// Functions of METH_FASTCALL hide behind another type.
template <typename Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"set_up", as_method(set_up), METH_FASTCALL, nullptr},
    {kAttentionMlpUp, as_method(call<kAttentionMlpUp, &EagerCalls::attention_mlp_up>),
     METH_FASTCALL, nullptr},
    {kMlpDown, as_method(call<kMlpDown, &EagerCalls::mlp_down>), METH_FASTCALL, nullptr},
    {kDecoderLayer, as_method(call<kDecoderLayer, &EagerCalls::decoder_layer>), METH_FASTCALL,
     nullptr},
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
