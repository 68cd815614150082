// Scripts that complete the program's command lines in a shell, made from its own options.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace clusterfusion::cli {

// For bash 4 or newer.
std::string bash_completion(CLI::App& app);
// A function of zsh's completion system, for a file _clusterfusion in $fpath.
std::string zsh_completion(CLI::App& app);

}  // namespace clusterfusion::cli
