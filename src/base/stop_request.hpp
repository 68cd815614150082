// Giving up in the middle of a long computation.
#pragma once

#include <exception>
#include <functional>

namespace clusterfusion {

// Asked again and again, on the thread of the call, while it computes: true means that its result
// is not wanted any more. Must be quick and must not throw.
using StopRequest = std::function<bool()>;

// Leaves a computation whose StopRequest said so.
class Stopped : public std::exception {
 public:
  const char* what() const noexcept override { return "stopped on request"; }
};

}  // namespace clusterfusion
