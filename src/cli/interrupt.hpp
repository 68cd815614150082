// Ctrl-C (SIGINT) and SIGTERM as a request to end, once.
#pragma once

#include "cli/exit_code.hpp"
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

// The exit code for the signal that an InterruptScope has noted; kDone if there was none.
ExitCode exit_code_of_signal() noexcept;
// Whether one was noted: EngineOptions::interrupted.
bool signal_noted() noexcept;

}  // namespace clusterfusion::cli
