// What the "normalizer" of tokenizer.json does to text before it is split.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/nfc.hpp"
#include "tokenizer/regex.hpp"

namespace clusterfusion {

// Either a text or an expression to look for.
struct Pattern {
  std::string text;  // not empty, if there is no expression
  std::shared_ptr<const Regex> regex;

  // Cuts `in` into matches and what is between; the parts cover it.
  std::vector<TextPart> find_all(std::string_view in) const;
  // `in` with every match replaced.
  std::string replaced(std::string_view in, std::string_view content) const;
};

struct Prepend {
  std::string prefix;  // before every text that is not empty
};
struct Replace {
  Pattern pattern;
  std::string content;
};
struct Strip {
  bool left, right;  // white space at these ends
};

using NormalizerStep = std::variant<NormalizationForm, Prepend, Replace, Strip>;

// The steps one after the other; nothing if the text stays as it is.
std::optional<std::string> normalize(const std::vector<NormalizerStep>& steps,
                                     std::string_view text);

}  // namespace clusterfusion
