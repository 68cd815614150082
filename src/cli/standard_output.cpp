#include "cli/standard_output.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/fail.hpp"

namespace clusterfusion::cli {
namespace {

[[noreturn]] void fail_output(int error) {
  if (error == EPIPE) throw OutputClosed{};
  fail(ErrorKind::io,
       "cannot write the result to standard output: {}; what was written is incomplete",
       std::strerror(error));
}

}  // namespace

void write_output(std::string_view text) {
  errno = 0;
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) fail_output(errno);
}

void flush_output() {
  errno = 0;
  if (std::fflush(stdout) != 0) fail_output(errno);
}

void close_output() {
  flush_output();
  errno = 0;
  if (std::fclose(stdout) != 0) fail_output(errno);
}

}  // namespace clusterfusion::cli
