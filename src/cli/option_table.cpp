#include "cli/option_table.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <sstream>
#include <string_view>

namespace clusterfusion::cli {
namespace {

// A validator's name is CLI11's place for what its owner wants to know again.
constexpr std::string_view kChoices = "one of ";

std::vector<std::string> choices_of(CLI::Option& option) {
  std::vector<std::string> choices;
  try {
    const std::string& name = option.get_validator(0)->get_name();
    if (!name.starts_with(kChoices)) return choices;
    std::istringstream words(name.substr(kChoices.size()));
    for (std::string word; words >> word;) choices.push_back(word);
  } catch (const CLI::OptionNotFound&) {
    // It has no validator.
  }
  return choices;
}

OptionEntry entry_of(CLI::Option& option) {
  OptionEntry entry;
  for (const std::string& name : option.get_snames()) entry.names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) entry.names.push_back("--" + name);
  entry.is_positional = entry.names.empty();
  if (entry.is_positional) entry.names.push_back(option.get_name());
  entry.description = option.get_description();
  entry.choices = choices_of(option);
  entry.may_repeat = option.get_expected_max() > 1;
  if (option.get_type_size() == 0) return entry;
  entry.value = entry.is_positional ? entry.names[0] : option.get_type_name();
  entry.default_value = option.get_default_str();
  return entry;
}

}  // namespace

CLI::Validator one_of(const std::vector<std::string>& names) {
  CLI::Validator validator = CLI::IsMember(names).description("");
  validator.name(fmt::format("{}{}", kChoices, fmt::join(names, " ")));
  return validator;
}

std::vector<OptionEntry> options_of(CLI::App& app) {
  std::vector<OptionEntry> entries;
  for (CLI::Option* option : app.get_options()) entries.push_back(entry_of(*option));
  return entries;
}

std::vector<CLI::App*> commands_of(CLI::App& app) {
  return app.get_subcommands([](CLI::App* command) { return !command->get_group().empty(); });
}

}  // namespace clusterfusion::cli
