// Subcommands that are parts of the Python package: Python takes this program's place.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "cli/commands.hpp"

namespace clusterfusion::cli {

struct PythonCommand {
  std::string name;
  std::string description;
  std::string example;
  std::string activity;  // what it does, for messages: "serving"
  std::string module;    // whose main() it is
  std::string extra;     // of the Python package, with what it needs
};

// What follows the command is Python's to read.
void add_python_command(CLI::App& app, Command& selected, PythonCommand command);

}  // namespace clusterfusion::cli
