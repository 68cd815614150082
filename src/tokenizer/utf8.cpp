#include "tokenizer/utf8.hpp"

#include <simdjson.h>

namespace clusterfusion {
namespace {

// What may follow a lead byte (Unicode, table 3-7): the length of the character and the range of
// its second byte. All further bytes are 80..BF.
struct LeadByte {
  std::size_t length;  // 0: not a lead byte
  unsigned char second_min, second_max;
};

LeadByte lead_byte(unsigned char byte) noexcept {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

Utf8Step next_utf8(std::string_view text) noexcept {
  const LeadByte lead = lead_byte(static_cast<unsigned char>(text[0]));
  if (lead.length == 0) return {Utf8Status::broken, 1, 0};
  for (std::size_t i = 1; i < lead.length; ++i) {
    if (i == text.size()) return {Utf8Status::unfinished, i, 0};
    const auto byte = static_cast<unsigned char>(text[i]);
    const unsigned char low = i == 1 ? lead.second_min : 0x80;
    const unsigned char high = i == 1 ? lead.second_max : 0xBF;
    if (byte < low || byte > high) return {Utf8Status::broken, i, 0};
  }
  std::size_t length = 0;
  const char32_t code_point = decode_valid(text.data(), length);
  return {Utf8Status::complete, length, code_point};
}

char32_t decode_last_valid(std::string_view text, std::size_t& length) noexcept {
  std::size_t start = text.size() - 1;
  while ((static_cast<unsigned char>(text[start]) & 0xC0) == 0x80) --start;
  return decode_valid(text.data() + start, length);
}

bool is_valid_utf8(std::string_view text) noexcept {
  return simdjson::validate_utf8(text.data(), text.size());
}

std::size_t append_repaired(std::string_view text, bool final, std::string& out) {
  if (is_valid_utf8(text)) {
    out += text;
    return text.size();
  }
  std::size_t done = 0;
  while (done < text.size()) {
    const Utf8Step step = next_utf8(text.substr(done));
    if (step.status == Utf8Status::unfinished && !final) break;
    out += step.status == Utf8Status::complete ? text.substr(done, step.length)
                                               : kReplacementCharacter;
    done += step.length;
  }
  return done;
}

}  // namespace clusterfusion
