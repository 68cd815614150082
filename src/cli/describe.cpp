// clusterfusion completion and man-page: the program's options for shells and for man.
#include "cli/commands.hpp"
#include "cli/completion.hpp"
#include "cli/man_page.hpp"
#include "cli/option_table.hpp"
#include "cli/standard_output.hpp"

namespace clusterfusion::cli {
namespace {

struct DescribeSettings {
  CLI::App* app = nullptr;
  std::string shell;
};

ExitCode complete(const DescribeSettings& settings) {
  write_output((settings.shell == "bash" ? bash_completion : zsh_completion)(*settings.app));
  return kDone;
}

ExitCode describe(const DescribeSettings& settings) {
  write_output(man_page(*settings.app, CLUSTERFUSION_VERSION));
  return kDone;
}

}  // namespace

void add_completion_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<DescribeSettings>();
  settings->app = &app;
  CLI::App& command = *add_command(
      app, selected, "completion", "Print a script that completes command lines in a shell.",
      settings, &complete,
      "cmake --install puts both where the shells look. By hand: for bash\n"
      "  clusterfusion completion bash > ~/.local/share/bash-completion/completions/clusterfusion\n"
      "and for zsh a file _clusterfusion in a folder of $fpath.",
      "clusterfusion completion bash");
  command.add_option("SHELL", settings->shell, "bash or zsh")
      ->required()
      ->transform(one_of({"bash", "zsh"}))
      ->type_name("");
}

// Not in --help: the build asks for it.
void add_man_page_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<DescribeSettings>();
  settings->app = &app;
  add_command(app, selected, "man-page", "Print the manual page.", settings, &describe, "",
              "clusterfusion man-page | man --local-file -")
      ->group("");
}

}  // namespace clusterfusion::cli
