// clusterfusion serve: the server is a part of the Python package; it takes this program's place.
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <system_error>
#include <vector>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/python.hpp"

namespace clusterfusion::cli {
namespace {

// Not of the current folder, whose files may have any name.
constexpr const char* kServe = R"(import sys
sys.path = [path for path in sys.path if path]
try:
    from clusterfusion.serve.__main__ import main
except ImportError as error:
    sys.exit(
        f"error: serving is a part of the Python package, which {sys.executable} cannot import "
        f"({error}); install it with: python -m pip install 'clusterfusion-lm[serve]', or name "
        "another Python in CLUSTERFUSION_HUB_PYTHON"
    )
sys.exit(main())
)";

// Returns only if it fails. Errors: not_found.
[[noreturn]] void become_server(const std::vector<std::string>& options) {
  std::string python = find_python();
  if (python.empty()) python = "python3";
  std::vector<std::string> arguments = {python, "-c", kServe};
  arguments.insert(arguments.end(), options.begin(), options.end());
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  std::signal(SIGPIPE, SIG_DFL);  // what is ignored would stay so
  ::execvp(argv[0], argv.data());
  fail(ErrorKind::not_found,
       "cannot run {} ({}): serving is a part of the Python package; install Python and "
       "'clusterfusion-lm[serve]', or name a Python in {}",
       python, std::generic_category().message(errno), kHubPython);
}

}  // namespace

void add_serve_command(CLI::App& app, Command& selected) {
  CLI::App* command = app.add_subcommand("serve", "Serve a model by the OpenAI API.");
  command->footer(
      "What follows is the Python package's: clusterfusion serve --help lists its options.\n\n"
      "Example:\n  clusterfusion serve models/demo --port 8000");
  command->set_help_flag();  // Python's --help
  command->prefix_command();
  command->callback([&selected, command] {
    selected = [options = command->remaining()]() -> ExitCode { become_server(options); };
  });
}

}  // namespace clusterfusion::cli
