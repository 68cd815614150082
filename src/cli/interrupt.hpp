// Ctrl-C (SIGINT) and SIGTERM as a request to end, once.
#pragma once

#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {

// While it lives, the first SIGINT or SIGTERM is noted and cancels `generation`; the second has its
// usual effect and ends the program at once. Outside its life, so while a model is being loaded,
// the first one does. Signals that the parent had ignored (nohup) stay ignored.
// At most one at a time; the generation must outlive it.
class InterruptScope {
 public:
  explicit InterruptScope(Generation* generation = nullptr);
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

  bool interrupted() const noexcept;
};

}  // namespace clusterfusion::cli
