// A command that there is not.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

namespace clusterfusion::cli {

// What is wrong with the first word of the command line, with the command that may be meant;
// nothing if it is a command or an option.
std::optional<std::string> unknown_command(const CLI::App& app, int argc, char** argv);

}  // namespace clusterfusion::cli
