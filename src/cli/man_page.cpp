#include "cli/man_page.hpp"

#include <fmt/format.h>

#include <string_view>

#include "cli/option_table.hpp"

namespace clusterfusion::cli {
namespace {

// A text as roff shows it: nothing in it is a request or an escape, and a hyphen is the one that is
// typed.
std::string literal(std::string_view text) {
  std::string result;
  bool begins_line = true;
  for (const char c : text) {
    if (begins_line && (c == '.' || c == '\'')) result += "\\&";
    if (c == '\\')
      result += "\\e";
    else if (c == '-')
      result += "\\-";
    else
      result += c;
    begins_line = c == '\n';
  }
  return result;
}

// Lines that are to stay as they are.
std::string lines(const std::string& text) {
  return text.empty() ? "" : fmt::format(".PP\n.nf\n{}\n.fi\n", literal(text));
}

std::string option_text(const OptionEntry& option) {
  std::string names;
  for (const std::string& name : option.names) {
    names += fmt::format("{}\\fB{}\\fR", names.empty() ? "" : ", ", literal(name));
  }
  if (!option.value.empty() && !option.is_positional) {
    names += fmt::format(" \\fI{}\\fR", literal(option.value));
  }
  std::string description = option.description;
  if (!option.default_value.empty()) {
    description += fmt::format(" (if not given: {})", option.default_value);
  }
  return fmt::format(".TP\n{}\n{}\n", names, literal(description));
}

std::string command_text(CLI::App& command) {
  std::string synopsis = fmt::format(".B clusterfusion {}\n[\\fIOPTIONS\\fR]", command.get_name());
  std::string options;
  for (const OptionEntry& option : options_of(command)) {
    if (option.is_positional) synopsis += fmt::format(" \\fI{}\\fR", option.names[0]);
    options += option_text(option);
  }
  return fmt::format(".SH \"{}\"\n{}\n.PP\n{}\n{}{}", command.get_name(), synopsis,
                     literal(command.get_description()), options, lines(command.get_footer()));
}

}  // namespace

std::string man_page(CLI::App& app, const std::string& version) {
  std::string page = fmt::format(
      ".\\\" Made by the program itself from the texts of its --help.\n"
      ".TH CLUSTERFUSION 1 \"\" \"ClusterFusion {}\"\n"
      ".SH NAME\nclusterfusion \\- {}\n"
      ".SH SYNOPSIS\n.B clusterfusion\n\\fICOMMAND\\fR [\\fIOPTIONS\\fR] \\fIMODEL\\fR\n"
      ".SH COMMANDS\n",
      version, literal(app.get_description()));
  for (CLI::App* command : commands_of(app)) {
    page += fmt::format(".TP\n\\fB{}\\fR\n{}\n", command->get_name(),
                        literal(command->get_description()));
  }
  page += ".SH OPTIONS\n";
  for (const OptionEntry& option : options_of(app)) page += option_text(option);
  page += lines(app.get_footer());
  for (CLI::App* command : commands_of(app)) page += command_text(*command);
  return page;
}

}  // namespace clusterfusion::cli
