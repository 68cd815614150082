#include "tokenizer/added_tokens.hpp"

#include <algorithm>
#include <utility>

#include "tokenizer/unicode_properties.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

std::size_t two_bytes(unsigned char first, unsigned char second) noexcept {
  return std::size_t{first} << 8 | second;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<Pattern> patterns)
    : patterns_(std::move(patterns)) {
  std::sort(patterns_.begin(), patterns_.end(),
            [](const Pattern& left, const Pattern& right) { return left.text < right.text; });
  for (const Pattern& pattern : patterns_) {
    const auto first = static_cast<unsigned char>(pattern.text[0]);
    if (pattern.text.size() > 1) {
      starts_.set(two_bytes(first, static_cast<unsigned char>(pattern.text[1])));
    } else {
      for (int second = 0; second < 256; ++second) {
        starts_.set(two_bytes(first, static_cast<unsigned char>(second)));
      }
    }
  }
}

// The longest pattern that `text` begins with: narrows the sorted patterns byte by byte.
const AddedTokenMatcher::Pattern* AddedTokenMatcher::longest_at(
    std::string_view text) const noexcept {
  const Pattern* longest = nullptr;
  auto begin = patterns_.begin();
  auto end = patterns_.end();
  for (std::size_t depth = 0; depth < text.size() && begin != end; ++depth) {
    const auto byte_less = [depth](const Pattern& pattern, unsigned char byte) {
      return static_cast<unsigned char>(pattern.text[depth]) < byte;
    };
    const auto less_byte = [depth](unsigned char byte, const Pattern& pattern) {
      return byte < static_cast<unsigned char>(pattern.text[depth]);
    };
    const auto byte = static_cast<unsigned char>(text[depth]);
    begin = std::lower_bound(begin, end, byte, byte_less);
    end = std::upper_bound(begin, end, byte, less_byte);
    if (begin != end && begin->text.size() == depth + 1) longest = &*begin++;
  }
  return longest;
}

bool AddedTokenMatcher::find(std::string_view text, std::size_t from, Match& match) const noexcept {
  if (patterns_.empty()) return false;
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    const auto first = static_cast<unsigned char>(text[begin]);
    const auto second =
        begin + 1 < text.size() ? static_cast<unsigned char>(text[begin + 1]) : std::uint8_t{0};
    if (!starts_[two_bytes(first, second)]) continue;
    if (const Pattern* pattern = longest_at(text.substr(begin))) {
      match = {begin, begin + pattern->text.size(), &pattern->token};
      return true;
    }
  }
  return false;
}

bool AddedTokenMatcher::stands_alone(std::string_view text, const Match& match) noexcept {
  const UnicodeProperties& properties = UnicodeProperties::get();
  std::size_t length = 0;
  if (match.begin > 0 &&
      properties.is_word(decode_last_valid(text.substr(0, match.begin), length))) {
    return false;
  }
  return match.end == text.size() ||
         !properties.is_word(decode_valid(text.data() + match.end, length));
}

// Where the white space that ends at `end` begins.
std::size_t AddedTokenMatcher::spaces_begin(std::string_view text, std::size_t end) noexcept {
  const UnicodeProperties& properties = UnicodeProperties::get();
  std::size_t length = 0;
  while (end > 0 && properties.is_space(decode_last_valid(text.substr(0, end), length))) {
    end -= length;
  }
  return end;
}

// Where the white space that begins at `begin` ends.
std::size_t AddedTokenMatcher::spaces_end(std::string_view text, std::size_t begin) noexcept {
  const UnicodeProperties& properties = UnicodeProperties::get();
  std::size_t length = 0;
  while (begin < text.size() && properties.is_space(decode_valid(text.data() + begin, length))) {
    begin += length;
  }
  return begin;
}

}  // namespace clusterfusion
