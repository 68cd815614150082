// The command line's options as data: what completion scripts and the manual page are made of.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace clusterfusion::cli {

struct OptionEntry {
  std::vector<std::string> names;  // as they are typed: "-q", "--quiet"; "MODEL" of a positional
  std::string description;
  std::string value;                 // what it takes, as --help calls it: "N"; empty of a flag
  std::string default_value;         // empty if there is none
  std::vector<std::string> choices;  // of one_of(); empty if it takes others
  bool is_positional = false;
  bool may_repeat = false;
};

// A value that is one of `names`. --help leaves it to the option's description to tell them.
CLI::Validator one_of(const std::vector<std::string>& names);

// In the order of --help.
std::vector<OptionEntry> options_of(CLI::App& app);
// Those that --help shows.
std::vector<CLI::App*> commands_of(CLI::App& app);

}  // namespace clusterfusion::cli
