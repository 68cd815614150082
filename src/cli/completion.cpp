#include "cli/completion.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string_view>
#include <vector>

#include "cli/option_table.hpp"

namespace clusterfusion::cli {
namespace {

bool takes_file(const OptionEntry& option) {
  return option.value == "FILE" || option.value == "MODEL";
}

// What bash may put in the place of a value: a line of a case statement.
std::string bash_value(const OptionEntry& option) {
  const std::string names = fmt::format("{}", fmt::join(option.names, " | "));
  if (!option.choices.empty())
    return fmt::format("        {}) words='{}' ;;\n", names, fmt::join(option.choices, " "));
  return fmt::format("        {}) {} ;;\n", names, takes_file(option) ? "files=1" : "return");
}

std::string bash_command(CLI::App& command) {
  std::string values;
  std::vector<std::string> names;
  std::string behind = "files=1";  // of the options: a checkpoint
  for (const OptionEntry& option : options_of(command)) {
    if (option.is_positional && !option.choices.empty())
      behind = fmt::format("words='{}'", fmt::join(option.choices, " "));
    if (option.is_positional) continue;
    names.insert(names.end(), option.names.begin(), option.names.end());
    if (!option.value.empty()) values += bash_value(option);
  }
  return fmt::format(
      "    {})\n"
      "      case $previous in\n"
      "{}"
      "        *) if [[ $current == -* ]]; then words='{}'; else {}; fi ;;\n"
      "      esac ;;\n",
      command.get_name(), values, fmt::join(names, " "), behind);
}

// Both shells' names of options and commands on the first place.
std::vector<std::string> first_words(CLI::App& app) {
  std::vector<std::string> words;
  for (const CLI::App* command : commands_of(app)) words.push_back(command->get_name());
  for (const OptionEntry& option : options_of(app))
    words.insert(words.end(), option.names.begin(), option.names.end());
  return words;
}

std::string replaced(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = text.find(from); at != text.npos; at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
  return text;
}

// In a specification of zsh's _arguments, within single quotes.
std::string zsh_escaped(std::string text) {
  text = replaced(std::move(text), "\\", "\\\\");
  for (const char* special : {"[", "]", ":"})
    text = replaced(std::move(text), special, std::string("\\") + special);
  return replaced(std::move(text), "'", "'\\''");
}

std::string zsh_value(const OptionEntry& option) {
  if (option.value.empty()) return "";
  std::string action = " ";
  if (!option.choices.empty()) action = fmt::format("({})", fmt::join(option.choices, " "));
  if (takes_file(option)) action = "_files";
  return fmt::format(":{}:{}", option.value, action);
}

std::string zsh_option(const OptionEntry& option) {
  const std::string description = zsh_escaped(option.description);
  if (option.is_positional) return fmt::format("'1{}'", zsh_value(option));
  const std::string repeat = option.may_repeat ? "*" : "";
  std::vector<std::string> names = option.names;
  if (!option.value.empty()) {
    for (std::string& name : names) name += name.starts_with("--") ? "=" : "+";
  }
  const std::string rest = fmt::format("[{}]{}'", description, zsh_value(option));
  if (names.size() == 1) return fmt::format("'{}{}{}", repeat, names[0], rest);
  const std::string others =
      option.may_repeat ? "'*'" : fmt::format("'({})'", fmt::join(option.names, " "));
  return fmt::format("{}{{{}}}'{}", others, fmt::join(names, ","), rest);
}

std::string zsh_command(CLI::App& command) {
  std::string text = fmt::format("    {})\n      _arguments -s", command.get_name());
  for (const OptionEntry& option : options_of(command))
    text += " \\\n        " + zsh_option(option);
  return text + " ;;\n";
}

}  // namespace

std::string bash_completion(CLI::App& app) {
  std::string commands;
  for (CLI::App* command : commands_of(app)) commands += bash_command(*command);
  return fmt::format(
      R"(# Completes clusterfusion's command lines in bash. Made by: clusterfusion completion bash
_clusterfusion() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}} words= files=
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    mapfile -t COMPREPLY < <(compgen -W '{}' -- "$current")
    return
  fi
  # bash takes "--device=cpu" for three words.
  if [[ $current == = ]]; then
    current=
  elif [[ $previous == = ]]; then
    previous=${{COMP_WORDS[COMP_CWORD - 2]}}
  fi
  case ${{COMP_WORDS[1]}} in
{}  esac
  if [[ $files ]]; then
    compopt -o filenames 2>/dev/null
    mapfile -t COMPREPLY < <(compgen -f -- "$current")
  else
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
  fi
}}
complete -F _clusterfusion clusterfusion
)",
      fmt::join(first_words(app), " "), commands);
}

std::string zsh_completion(CLI::App& app) {
  std::string names, commands;
  for (CLI::App* command : commands_of(app)) {
    names +=
        fmt::format("    '{}:{}'\n", command->get_name(), zsh_escaped(command->get_description()));
    commands += zsh_command(*command);
  }
  std::string options;
  for (const OptionEntry& option : options_of(app)) options += " \\\n      " + zsh_option(option);
  return fmt::format(
      R"(#compdef clusterfusion
# Completes clusterfusion's command lines in zsh. Made by: clusterfusion completion zsh
_clusterfusion() {{
  local -a commands=(
{}  )
  if ((CURRENT == 2)); then
    _describe -t commands command commands
    _arguments{}
    return
  fi
  local command=$words[2]
  shift words
  ((CURRENT--))
  case $command in
{}  esac
}}
_clusterfusion "$@"
)",
      names, options, commands);
}

}  // namespace clusterfusion::cli
