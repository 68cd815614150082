// Standard output that does not lose anything in silence.
#pragma once

#include <string_view>

namespace clusterfusion::cli {

// Thrown when whoever read standard output has gone (`| head`): a reason to stop, not an error.
struct OutputClosed {};

// Writes all of `text`; it may stay in the buffer until flush_output().
// Errors: OutputClosed; io with the reason of the operating system (a full disk, ...).
void write_output(std::string_view text);
void flush_output();
// The last word: flushes and closes, so that errors which only show then are seen.
void close_output();

}  // namespace clusterfusion::cli
