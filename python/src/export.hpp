// Exporting functions to Python: the one place where C++ exceptions turn into Python's.
#pragma once

#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <atomic>
#include <exception>
#include <new>
#include <utility>

#include "clusterfusion/error.hpp"

namespace clusterfusion::python {

// Whether the interpreter ends, and waits for calls of other threads than its main one.
inline std::atomic<bool> calls_are_ending = false;

// Errors of a file's contents are told from those of arguments, which are ValueErrors too: see
// MalformedFileError in _native_call.py.
inline const char* exception_name(ErrorKind kind) noexcept {
  return kind == ErrorKind::malformed ? "MalformedFileError" : python_exception_name(kind);
}

// Runs `function` and lets every exception leave as one that names its Python class. The backtrace
// is empty: where in this library an error was noticed is no news to a Python user.
template <auto function>
struct Guard;

template <typename Result, typename... Args, Result (*function)(Args...)>
struct Guard<function> {
  static Result call(Args... args) {
    try {
      return function(std::forward<Args>(args)...);
    } catch (const Error& error) {
      // EngineOptions::interrupted was true because a signal handler has raised something.
      if (error.kind() == ErrorKind::interrupted && !calls_are_ending) {
        throw tvm::ffi::EnvErrorAlreadySet();
      }
      throw tvm::ffi::Error(exception_name(error.kind()), error.what(), "");
    } catch (const tvm::ffi::Error&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw tvm::ffi::Error("MemoryError",
                            "out of host memory: free some, or use a smaller model, "
                            "context or batch",
                            "");
    } catch (const std::exception& error) {
      throw tvm::ffi::Error("RuntimeError", error.what(), "");
    }
  }
};

}  // namespace clusterfusion::python

// Exports the function `name` of this namespace under the same name. (tvm-ffi's macro leaves the C
// ABI's `self` parameter unused.)
#define CLUSTERFUSION_EXPORT(name)                                                        \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wunused-parameter\"") \
      TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, (::clusterfusion::python::Guard<&name>::call))  \
          _Pragma("GCC diagnostic pop")

// The same for a function that takes all its arguments as one tvm::ffi::PackedArgs, so that it can
// name them in its errors. It returns nothing.
#define CLUSTERFUSION_EXPORT_PACKED(name)                                               \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* arguments, \
                                                     int32_t count, TVMFFIAny*) {       \
    TVM_FFI_SAFE_CALL_BEGIN();                                                          \
    ::clusterfusion::python::Guard<&name>::call(                                        \
        {reinterpret_cast<const ::tvm::ffi::AnyView*>(arguments), count});              \
    TVM_FFI_SAFE_CALL_END();                                                            \
  }
