#include "cli/text_source.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/fail.hpp"
#include "cli/terminal.hpp"
#include "cli/token_text.hpp"

namespace clusterfusion::cli {
namespace {

// Far beyond any text worth scoring; keeps /dev/zero from eating the machine's memory.
constexpr std::size_t kMaxTextBytes = std::size_t{256} << 20;

bool from_file(const TextSource& source) {
  return source.file_option->count() > 0 && source.file != "-";
}

[[noreturn]] void fail_reading(int error, const std::string& name) {
  const ErrorKind kind = error == ENOENT || error == ENOTDIR ? ErrorKind::not_found
                         : error == EACCES || error == EPERM ? ErrorKind::permission_denied
                                                             : ErrorKind::io;
  fail(kind, "cannot read text from {}: {}; expected a readable text file", name,
       std::strerror(error));
}

std::string read_all(int descriptor, const std::string& name) {
  std::string text;
  char buffer[1 << 16];
  while (true) {
    const ssize_t size = read(descriptor, buffer, sizeof buffer);
    if (size == 0) return text;
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) fail_reading(errno, name);
    text.append(buffer, static_cast<std::size_t>(size));
    require(text.size() <= kMaxTextBytes, ErrorKind::invalid_argument,
            "{} holds more than {} bytes of text, the most that is read; give a part of it", name,
            kMaxTextBytes);
  }
}

std::string read_file(const std::string& file) {
  const int descriptor = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail_reading(errno, quote(file));
  struct Closer {
    int descriptor;
    ~Closer() { close(descriptor); }
  } closer{descriptor};
  return read_all(descriptor, quote(file));
}

}  // namespace

void add_text_options(CLI::App& app, TextSource& source, const std::string& name,
                      const std::string& file_name) {
  source.text_option =
      app.add_option("-p," + name, source.text, "the text; - for standard input (the default)")
          ->type_name("TEXT");
  source.file_option = app.add_option("-f," + file_name, source.file, "a file with the text")
                           ->type_name("FILE")
                           ->excludes(source.text_option);
}

std::string read_text(const TextSource& source) {
  std::string text;
  if (is_typed(source)) {
    text = source.text;
  } else if (from_file(source)) {
    text = read_file(source.file);
  } else {
    require(!stdin_is_terminal(), ErrorKind::invalid_argument,
            "no text: give {} \"...\", {} FILE, or a text on standard input",
            source.text_option->get_name(), source.file_option->get_name());
    text = read_all(STDIN_FILENO, "standard input");
  }
  require(!text.empty(), ErrorKind::invalid_argument,
          "the text from {} is empty; expected at least one character", name_of(source));
  return text;
}

bool is_typed(const TextSource& source) {
  return source.text_option->count() > 0 && source.text != "-";
}

std::string name_of(const TextSource& source) {
  if (is_typed(source)) return source.text_option->get_name();
  if (from_file(source)) return quote(source.file);
  return "standard input";
}

}  // namespace clusterfusion::cli
