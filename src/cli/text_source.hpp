// Where a command's text comes from: an option, a file or standard input.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace clusterfusion::cli {

struct TextSource {
  std::string text;
  std::string file;
  CLI::Option* text_option = nullptr;
  CLI::Option* file_option = nullptr;
};

// Adds "-p,--NAME" (the text itself) and "-f,--FILE_NAME" (a file with it); "-" or neither stands
// for standard input.
void add_text_options(CLI::App& app, TextSource& source, const std::string& name,
                      const std::string& file_name);

// The whole text, byte for byte. Errors: invalid_argument if there is none and standard input is a
// terminal, or if the text is empty; not_found, permission_denied, io for files.
std::string read_text(const TextSource& source);

// Whether the text stands on the command line itself.
bool is_typed(const TextSource& source);

// How messages call the source: "--text", "FILE" or "standard input".
std::string name_of(const TextSource& source);

}  // namespace clusterfusion::cli
