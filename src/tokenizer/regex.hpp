// Regular expressions of tokenizer.json, found in text as tokenizers finds them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace clusterfusion {

// A stretch of a text: a match, or what stands between matches.
struct TextPart {
  std::size_t begin, end;
  bool is_match;
};

// Immutable; may be used from several threads.
//
// The characters of a text are first replaced by one-byte symbols: those that all sets of the
// expression treat alike have the same one. PCRE2 then sees bytes alone, and Unicode's properties
// are those of tokenizers, whatever library is installed.
class Regex {
 public:
  // `pattern`: see regex_syntax.hpp. `where` stands for it in messages. Errors: unsupported.
  Regex(std::string_view pattern, const std::string& where);
  ~Regex();
  Regex(const Regex&) = delete;
  Regex& operator=(const Regex&) = delete;

  // Cuts a well-formed text into matches and what is between them; the parts, in order, cover it.
  // Matches may be empty, other parts are not. Errors: unsupported, if the expression takes too
  // long for it.
  void for_each_part(std::string_view text,
                     const std::function<void(const TextPart&)>& on_part) const;
  std::vector<TextPart> find_all(std::string_view text) const;

 private:
  struct Compiled;
  class Search;

  std::string where_;
  std::vector<std::uint8_t> symbols_;  // by code point
  std::unique_ptr<const Compiled> compiled_;
};

}  // namespace clusterfusion
