// Throwing an Error with a formatted message.
#pragma once

#include <fmt/format.h>

#include <string>

#include "clusterfusion/error.hpp"

namespace clusterfusion {

template <typename... Args>
[[noreturn]] void fail(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(kind, fmt::format(format, std::forward<Args>(args)...));
}

// Like fail() if `condition` does not hold.
template <typename... Args>
void require(bool condition, ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  if (!condition) fail(kind, format, std::forward<Args>(args)...);
}

}  // namespace clusterfusion
