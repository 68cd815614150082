// The program: parses the command line, runs the chosen subcommand, and turns whatever happens into
// one message and an exit code.
#include <fmt/format.h>

#include <csignal>
#include <exception>
#include <memory>
#include <new>

#include "cli/commands.hpp"
#include "cli/help_formatter.hpp"
#include "cli/interrupt.hpp"
#include "cli/option_names.hpp"
#include "cli/standard_output.hpp"
#include "cli/terminal.hpp"
#include "cli/unknown_command.hpp"
#include "clusterfusion/error.hpp"

namespace clusterfusion::cli {
namespace {

void add_commands(CLI::App& app, Command& selected) {
  app.formatter(std::make_shared<HelpFormatter>());
  app.set_version_flag("--version", "clusterfusion " CLUSTERFUSION_VERSION);
  app.require_subcommand(0, 1);
  add_generate_command(app, selected);
  add_score_command(app, selected);
  add_perplexity_command(app, selected);
  add_tokenize_command(app, selected);
  add_info_command(app, selected);
  add_bench_command(app, selected);
  add_serve_command(app, selected);
  add_chat_command(app, selected);
  add_completion_command(app, selected);
  add_man_page_command(app, selected);
  app.footer(
      "Each command's --help ends with an example.\n"
      "Exit codes: 0 done; 1 failed (a file, memory, the device, ...); 2 misused (an option, a\n"
      "value, a prompt or a token id is wrong); 130 and 143 ended by SIGINT (Ctrl-C), SIGTERM.\n\n"
      "Example:\n  clusterfusion generate models/demo -p \"It was a dark night\"");
}

std::string command_name(const CLI::App& app) {
  std::string name = "clusterfusion";
  for (const CLI::App* command : app.get_subcommands()) name += " " + command->get_name();
  return name;
}

ExitCode misused(const CLI::App& app, const CLI::ParseError& error) {
  print_error(fmt::format("{}; see {} --help", error.what(), command_name(app)));
  return kMisused;
}

ExitCode run(int argc, char** argv) {
  CLI::App app("Decode GPT-NeoX models (Pythia and relatives) at the speed of memory.",
               "clusterfusion");
  Command selected;
  add_commands(app, selected);
  if (const auto message = unknown_command(app, argc, argv)) {
    print_error(*message + "; see clusterfusion --help");
    return kMisused;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    write_output(app.help());
    return kDone;
  } catch (const CLI::CallForVersion& version) {
    write_output(fmt::format("{}\n", version.what()));
    return kDone;
  } catch (const CLI::ParseError& error) {
    return misused(app, error);
  }
  if (!selected) {
    write_stderr(app.help());
    return kMisused;
  }
  return selected();
}

// Runs and closes standard output. Nothing is thrown out of here.
ExitCode run_guarded(int argc, char** argv) noexcept {
  try {
    const ExitCode code = run(argc, argv);
    close_output();
    return code;
  } catch (const OutputClosed&) {
    return kDone;
  } catch (const Error& error) {
    print_error(with_option_names(error.what()));
    return signal_noted() ? exit_code_of_signal() : exit_code_of(error.kind());
  } catch (const std::bad_alloc&) {
    print_error("out of memory; use a smaller model, text or --context");
  } catch (const std::exception& error) {
    print_error(fmt::format("internal error, please report it: {}", error.what()));
  }
  return kFailed;
}

}  // namespace
}  // namespace clusterfusion::cli

int main(int argc, char** argv) {
  // A closed pipe arrives as an error of the write, also where the parent had not ignored it.
  std::signal(SIGPIPE, SIG_IGN);
  return clusterfusion::cli::run_guarded(argc, argv);
}
