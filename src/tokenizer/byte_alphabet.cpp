#include "tokenizer/byte_alphabet.hpp"

#include <array>

#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// No byte is spelled with a code point as large as this.
constexpr char32_t kAlphabetEnd = 0x144;

bool spells_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct Alphabet {
  std::array<char32_t, 256> code_point{};
  std::array<int, kAlphabetEnd> byte{};

  Alphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (int b = 0; b < 256; ++b) {
      code_point[b] = spells_itself(b) ? static_cast<char32_t>(b) : next++;
      byte[code_point[b]] = b;
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

std::string spell_byte(unsigned char byte) {
  const char32_t c = alphabet().code_point[byte];
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
}

std::optional<std::string> unspell_bytes(std::string_view spelled) {
  const Alphabet& table = alphabet();
  std::string bytes;
  bytes.reserve(spelled.size());
  for (std::size_t position = 0, length = 0; position < spelled.size(); position += length) {
    const char32_t c = decode_valid(spelled.data() + position, length);
    if (c >= kAlphabetEnd || table.byte[c] < 0) return std::nullopt;
    bytes += static_cast<char>(table.byte[c]);
  }
  return bytes;
}

}  // namespace clusterfusion
