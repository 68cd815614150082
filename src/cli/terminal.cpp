#include "cli/terminal.hpp"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace clusterfusion::cli {
namespace {

// https://no-color.org: any value but the empty one turns colour off.
bool use_colour() {
  const char* no_color = std::getenv("NO_COLOR");
  return stderr_is_terminal() && (no_color == nullptr || *no_color == '\0');
}

void print_message(std::string_view level, std::string_view colour, std::string_view message) {
  if (use_colour()) {
    write_stderr(fmt::format("clusterfusion: \x1b[1;{}m{}:\x1b[0m {}\n", colour, level, message));
  } else {
    write_stderr(fmt::format("clusterfusion: {}: {}\n", level, message));
  }
}

}  // namespace

bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) == 1 && !(term != nullptr && std::string_view(term) == "dumb");
}

bool stdin_is_terminal() { return isatty(STDIN_FILENO) == 1; }
bool stdout_is_terminal() { return isatty(STDOUT_FILENO) == 1; }

int terminal_columns() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

void write_stderr(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stderr); }

void print_error(std::string_view message) { print_message("error", "31", message); }
void print_warning(std::string_view message) { print_message("warning", "33", message); }

}  // namespace clusterfusion::cli
