// Finding added tokens in text, as tokenizers' AddedVocabulary does.
#pragma once

#include <algorithm>
#include <bitset>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// One entry of "added_tokens" in tokenizer.json.
struct AddedToken {
  TokenId id = 0;
  std::string content;
  bool single_word = false;  // only where no word character stands on either side
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool normalized = false;   // looked for in normalized text, in its normalized form
  bool special = false;      // decoding may leave it out
};

// A set of added tokens that are looked for together. At each place the longest one counts; what is
// found is not looked through again.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;
  // Each token with the form in which it stands in text. No two forms may be equal or empty.
  struct Pattern {
    std::string text;
    AddedToken token;
  };
  explicit AddedTokenMatcher(std::vector<Pattern> patterns);

  // Splits well-formed `text` into pieces, in order: on_text(std::string_view) for text between
  // added tokens (never empty), on_token(TokenId) for each added token.
  template <typename OnText, typename OnToken>
  void split(std::string_view text, OnText&& on_text, OnToken&& on_token) const {
    std::size_t done = 0;
    std::size_t position = 0;
    Match match;
    while (find(text, position, match)) {
      position = match.end;
      if (match.token->single_word && !stands_alone(text, match)) continue;
      if (match.token->lstrip) match.begin = std::max(done, spaces_begin(text, match.begin));
      if (match.token->rstrip) match.end = spaces_end(text, match.end);
      if (done < match.begin) on_text(text.substr(done, match.begin - done));
      // Another added token may lie in the white space that one with rstrip has taken. tokenizers
      // finds it all the same and goes on behind it, but drops it if lstrip leaves nothing of it.
      if (match.begin < match.end) on_token(match.token->id);
      done = match.end;
    }
    if (done < text.size()) on_text(text.substr(done));
  }

 private:
  struct Match {
    std::size_t begin = 0, end = 0;
    const AddedToken* token = nullptr;
  };

  bool find(std::string_view text, std::size_t from, Match& match) const noexcept;
  const Pattern* longest_at(std::string_view text) const noexcept;
  static bool stands_alone(std::string_view text, const Match& match) noexcept;
  static std::size_t spaces_begin(std::string_view text, std::size_t end) noexcept;
  static std::size_t spaces_end(std::string_view text, std::size_t begin) noexcept;

  std::vector<Pattern> patterns_;  // sorted by text
  std::bitset<1 << 16> starts_;    // the first two bytes that patterns begin with
};

}  // namespace clusterfusion
