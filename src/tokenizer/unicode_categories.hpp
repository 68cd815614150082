// General categories of code points, and what splitting asks of them, as Hugging Face tokenizers
// sees them: a table of our own, for the reasons that unicode_properties.hpp gives.
#pragma once

#include <cstdint>
#include <string_view>

#include "tokenizer/code_point_set.hpp"

namespace clusterfusion {

enum class CodePointProperty {
  regex_word,   // \w of regular expressions, outside of classes
  numeric,      // what the pre-tokenizer Digits takes for a digit
  punctuation,  // what the pre-tokenizer Punctuation takes for punctuation
};

// The code points of a general category ("Lu") or of a group of them ("L"); empty if there is none
// of that name.
CodePointSet code_points_of_category(std::string_view name);
const CodePointSet& code_points_with(CodePointProperty property);
// White space in regular expressions.
const CodePointSet& white_space();

}  // namespace clusterfusion
