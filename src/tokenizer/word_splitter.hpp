// Splitting text into words as the byte-level pre-tokenizer does. The regex, of GPT-2
// (openai/gpt-2, src/encoder.py), matched from left to right, first alternative that fits:
//
//   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
#pragma once

#include <cstddef>
#include <string_view>

#include "tokenizer/unicode_properties.hpp"

namespace clusterfusion {

class WordSplitter {
 public:
  // `text` must be well-formed UTF-8 and outlive the splitter.
  explicit WordSplitter(std::string_view text)
      : text_(text), properties_(UnicodeProperties::get()) {}

  // The next word; empty at the end. The words cover the text without gaps.
  std::string_view next() noexcept;

 private:
  std::size_t contraction_length(std::size_t position) const noexcept;
  CharClass class_at(std::size_t position, std::size_t& length) const noexcept;
  std::size_t end_of_run(std::size_t position, CharClass char_class) const noexcept;
  std::size_t end_of_spaces(std::size_t position) const noexcept;

  std::string_view text_;
  std::size_t position_ = 0;
  const UnicodeProperties& properties_;
};

}  // namespace clusterfusion
