// The program's manual page, made from the texts of its --help.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace clusterfusion::cli {

// In the macros of man(7), for share/man/man1.
std::string man_page(CLI::App& app, const std::string& version);

}  // namespace clusterfusion::cli
