// The subcommands. Each adds itself to the command line; the one that the caller chose is left in
// `selected` and runs once the whole command line is known to be well-formed.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "cli/exit_code.hpp"

namespace clusterfusion::cli {

// Errors: Error, OutputClosed.
using Command = std::function<ExitCode()>;

void add_generate_command(CLI::App& app, Command& selected);
void add_score_command(CLI::App& app, Command& selected);
void add_perplexity_command(CLI::App& app, Command& selected);
void add_tokenize_command(CLI::App& app, Command& selected);
void add_info_command(CLI::App& app, Command& selected);
void add_bench_command(CLI::App& app, Command& selected);
void add_serve_command(CLI::App& app, Command& selected);
void add_chat_command(CLI::App& app, Command& selected);
void add_completion_command(CLI::App& app, Command& selected);
void add_man_page_command(CLI::App& app, Command& selected);

// A subcommand whose options fill `settings` and that then calls `run`. The help ends with `notes`
// (the keys of the JSON document, how it ends) and `example`.
template <typename Settings>
CLI::App* add_command(CLI::App& app, Command& selected, const std::string& name,
                      const std::string& description, std::shared_ptr<Settings> settings,
                      ExitCode (*run)(const Settings&), const std::string& notes,
                      const std::string& example) {
  CLI::App* command = app.add_subcommand(name, description);
  command->footer(notes + "\n\nExample:\n  " + example);
  command->callback([&selected, settings, run] { selected = [=] { return run(*settings); }; });
  return command;
}

}  // namespace clusterfusion::cli
