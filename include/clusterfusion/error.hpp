// The one exception type of the library.
//
// Every message says what was expected, what was found, where (file, tensor, option, index), and
// what to do. The kind decides which Python exception the message arrives in.
#pragma once

#include <stdexcept>
#include <string>

namespace clusterfusion {

enum class ErrorKind {
  invalid_argument,   // a value that the caller passed is wrong             -> ValueError
  wrong_type,         // an argument has the wrong type or dtype             -> TypeError
  out_of_range,       // an index or id lies outside its range               -> IndexError
  not_found,          // a file or folder does not exist                     -> FileNotFoundError
  permission_denied,  // the file exists but may not be read or written      -> PermissionError
  io,                 // any other failure of the operating system           -> OSError
  malformed,          // a file does not hold what its format promises       -> ValueError
  unsupported,        // well-formed, but not something this library runs    -> NotImplementedError
  out_of_memory,      // host or device memory does not suffice              -> MemoryError
  non_finite,         // NaN or infinity where a finite value must be        -> ArithmeticError
  interrupted,        // the caller's EngineOptions::interrupted ended it    -> InterruptedError
  internal,           // a broken promise inside the library: please report  -> RuntimeError
};

// The name of the Python exception that `kind` becomes ("ValueError", ...).
const char* python_exception_name(ErrorKind kind) noexcept;

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace clusterfusion
