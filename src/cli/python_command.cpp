#include "cli/python_command.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <system_error>
#include <utility>
#include <vector>

#include "base/fail.hpp"
#include "cli/python.hpp"

namespace clusterfusion::cli {
namespace {

// Not of the current folder, whose files may have any name.
constexpr const char* kScript = R"(import sys
sys.path = [path for path in sys.path if path]
try:
    from {module} import main
except ImportError as error:
    sys.exit(
        f"error: {activity} is a part of the Python package, which {{sys.executable}} cannot import "
        f"({{error}}); install it with: python -m pip install 'clusterfusion-lm[{extra}]', or name "
        "another Python in CLUSTERFUSION_HUB_PYTHON"
    )
sys.exit(main())
)";

// Returns only if it fails. Errors: not_found.
[[noreturn]] void become_python(const PythonCommand& command,
                                const std::vector<std::string>& options) {
  std::string python = find_python();
  if (python.empty()) python = "python3";
  const std::string script =
      fmt::format(kScript, fmt::arg("module", command.module),
                  fmt::arg("activity", command.activity), fmt::arg("extra", command.extra));
  std::vector<std::string> arguments = {python, "-c", script};
  arguments.insert(arguments.end(), options.begin(), options.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::signal(SIGPIPE, SIG_DFL);  // what is ignored would stay so
  ::execvp(argv[0], argv.data());
  fail(ErrorKind::not_found,
       "cannot run {} ({}): {} is a part of the Python package; install Python and "
       "'clusterfusion-lm[{}]', or name a Python in {}",
       python, std::generic_category().message(errno), command.activity, command.extra, kHubPython);
}

}  // namespace

void add_python_command(CLI::App& app, Command& selected, PythonCommand command) {
  CLI::App* subcommand = app.add_subcommand(command.name, command.description);
  subcommand->footer(
      fmt::format("What follows is the Python package's: clusterfusion {} --help lists its options."
                  "\n\nExample:\n  {}",
                  command.name, command.example));
  subcommand->set_help_flag();  // Python's --help
  subcommand->prefix_command();
  subcommand->callback([&selected, subcommand, command = std::move(command)] {
    selected = [command, options = subcommand->remaining()]() -> ExitCode {
      become_python(command, options);
    };
  });
}

}  // namespace clusterfusion::cli
