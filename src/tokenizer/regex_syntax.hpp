// Reading regular expressions of tokenizer.json: Oniguruma's syntax, as tokenizers takes them.
//
// All that is asked of characters is resolved here into sets of code points, by Oniguruma's rules
// and tokenizers' version of Unicode. What is left is the shape of the expression, in a syntax that
// PCRE2 shares.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/code_point_set.hpp"

namespace clusterfusion {

struct RegexSyntax {
  // One element of the expression: one character out of a set, or what stands between those.
  struct Element {
    std::string shape;               // in PCRE2's syntax, if it is no set
    std::optional<std::size_t> set;  // index of `sets`
  };
  std::vector<Element> elements;
  std::vector<CodePointSet> sets;  // all different
};

// `pattern` must be well-formed UTF-8; `where` stands for it in messages. Supported: literals,
// escapes, classes (nested, negated, with &&), \p{..} of general categories, \d \s \w and their
// opposites, groups, look-ahead and look-behind, (?i), quantifiers, ^ $ \A \z \Z \b \B. Errors:
// unsupported, which names what is not.
RegexSyntax read_regex(std::string_view pattern, const std::string& where);

}  // namespace clusterfusion
