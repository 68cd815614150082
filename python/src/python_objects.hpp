// Python's objects as the extension _eager owns them, and its way out of what is not as usual.
#pragma once

#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
// Python.h comes first.
#include <cstddef>
#include <exception>
#include <memory>

namespace clusterfusion::python {

// Thrown where a call is to be made in the other way.
struct Unusual : std::exception {};

// References are counted by functions of the Python that runs: the macros of an older one's headers
// would count those of objects that a newer one never frees.
struct Release {
  void operator()(PyObject* object) const noexcept { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// An object of Python's, or Unusual if making it failed.
inline Owned own(PyObject* object) {
  if (object == nullptr) throw Unusual{};
  return Owned(object);
}

// One more reference to an object that somebody else holds.
inline Owned share(PyObject* object) {
  Py_IncRef(object);
  return own(object);
}

// Puts an object into a tuple that nobody else has yet.
inline void put_into(const Owned& tuple, std::size_t index, Owned object) {
  if (PyTuple_SetItem(tuple.get(), static_cast<Py_ssize_t>(index), object.release()) != 0) {
    throw Unusual{};
  }
}

}  // namespace clusterfusion::python
