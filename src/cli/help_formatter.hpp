// The look of --help.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace clusterfusion::cli {

// CLI11's own without "Excludes: ..." behind every name: what must not stand together is said when
// it does.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_type_size() == 0 || option->get_type_name().empty()) return "";
    std::string text = " " + option->get_type_name();
    if (!option->get_default_str().empty()) text += "=" + option->get_default_str();
    return text;
  }
};

}  // namespace clusterfusion::cli
