// Reading UTF-8 that may be broken, as Unicode recommends (section 3.9, "U+FFFD Substitution of
// Maximal Subparts") and Python's errors="replace" and Rust's from_utf8_lossy do.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace clusterfusion {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";  // U+FFFD

enum class Utf8Status {
  complete,    // a well-formed character
  broken,      // a maximal ill-formed subsequence
  unfinished,  // the text ends inside what could become a well-formed character
};

// What stands at the beginning of a text: `length` bytes, at least 1.
struct Utf8Step {
  Utf8Status status;
  std::size_t length;
  char32_t code_point;  // only if complete
};

// Looks at the first character of `text`, which must not be empty.
Utf8Step next_utf8(std::string_view text) noexcept;

// The first code point of a text that is known to be well-formed and not empty; sets its length.
inline char32_t decode_valid(const char* text, std::size_t& length) noexcept {
  const auto byte = [text](int index) { return static_cast<unsigned char>(text[index]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) {
    length = 1;
    return lead;
  }
  if (lead < 0xE0) {
    length = 2;
    return (lead & 0x1Fu) << 6 | (byte(1) & 0x3Fu);
  }
  if (lead < 0xF0) {
    length = 3;
    return (lead & 0x0Fu) << 12 | (byte(1) & 0x3Fu) << 6 | (byte(2) & 0x3Fu);
  }
  length = 4;
  return (lead & 0x07u) << 18 | (byte(1) & 0x3Fu) << 12 | (byte(2) & 0x3Fu) << 6 |
         (byte(3) & 0x3Fu);
}

// The last code point of a text that is known to be well-formed and not empty; sets its length.
char32_t decode_last_valid(std::string_view text, std::size_t& length) noexcept;

bool is_valid_utf8(std::string_view text) noexcept;

// Appends `text` to `out` with each maximal ill-formed subsequence replaced by U+FFFD. Returns how
// many bytes were read: with `final`, all; without, an unfinished character at the end is left.
std::size_t append_repaired(std::string_view text, bool final, std::string& out);

}  // namespace clusterfusion
