// Unicode properties of code points as Hugging Face tokenizers sees them.
//
// They are a table of our own, not utf8proc's, because tokenizers mixes Unicode versions (NFC of
// one, regex classes of another) and results must not depend on the installed utf8proc.
#pragma once

#include <cstdint>

namespace clusterfusion {

enum class CharClass : std::uint8_t { other = 0, letter = 1, number = 2, space = 3 };

class UnicodeProperties {
 public:
  // The one table; built at the first call.
  static const UnicodeProperties& get();

  // Which of \p{L}, \p{N}, \s or none of them the byte-level regex takes `c` for.
  CharClass char_class(char32_t c) const noexcept {
    return static_cast<CharClass>(bits_[c] & kClassMask);
  }
  bool is_space(char32_t c) const noexcept { return char_class(c) == CharClass::space; }
  // \w of the regex that guards single-word added tokens.
  bool is_word(char32_t c) const noexcept { return (bits_[c] & kWord) != 0; }
  // NFC may change or move `c`, or join it to what stands before it.
  bool is_normalization_sensitive(char32_t c) const noexcept {
    return (bits_[c] & kNormalizationSensitive) != 0;
  }
  // NFC may join something to `c`.
  bool is_normalization_base(char32_t c) const noexcept {
    return (bits_[c] & kNormalizationBase) != 0;
  }

  // NFKC decomposes `c` where NFC does not.
  bool is_compatibility(char32_t c) const noexcept { return (bits_[c] & kCompatibility) != 0; }

 private:
  static constexpr std::uint8_t kClassMask = 3;
  static constexpr std::uint8_t kWord = 4;
  static constexpr std::uint8_t kNormalizationSensitive = 8;
  static constexpr std::uint8_t kNormalizationBase = 16;
  static constexpr std::uint8_t kCompatibility = 32;

  UnicodeProperties();

  std::uint8_t bits_[0x110000] = {};
};

}  // namespace clusterfusion
