#include "clusterfusion/error.hpp"

namespace clusterfusion {

const char* python_exception_name(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::invalid_argument: return "ValueError";
    case ErrorKind::wrong_type: return "TypeError";
    case ErrorKind::out_of_range: return "IndexError";
    case ErrorKind::not_found: return "FileNotFoundError";
    case ErrorKind::permission_denied: return "PermissionError";
    case ErrorKind::io: return "OSError";
    case ErrorKind::malformed: return "ValueError";
    case ErrorKind::unsupported: return "NotImplementedError";
    case ErrorKind::out_of_memory: return "MemoryError";
    case ErrorKind::non_finite: return "ArithmeticError";
    case ErrorKind::interrupted: return "InterruptedError";
    case ErrorKind::internal: return "RuntimeError";
  }
  return "RuntimeError";
}

}  // namespace clusterfusion
