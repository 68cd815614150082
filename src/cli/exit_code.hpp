// What the program returns to its caller, and where the line between "failed" and "misused" runs.
#pragma once

#include "clusterfusion/error.hpp"

namespace clusterfusion::cli {

enum ExitCode : int {
  kDone = 0,           // the result is written
  kFailed = 1,         // the command line was fine, but a file, the memory or a device was not
  kMisused = 2,        // the command line is wrong: an option, a value, a prompt, a token id
  kInterrupted = 130,  // SIGINT (Ctrl-C) ended it: 128 + the signal's number, as shells count
  kTerminated = 143,   // SIGTERM did
};

// A value that the caller chose is misuse, whether the parser or the engine refused it; what a file
// or the machine brought about is failure.
inline ExitCode exit_code_of(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::invalid_argument:
    case ErrorKind::wrong_type:
    case ErrorKind::out_of_range: return kMisused;
    default: return kFailed;
  }
}

}  // namespace clusterfusion::cli
