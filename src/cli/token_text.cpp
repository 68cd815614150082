#include "cli/token_text.hpp"

#include <fmt/format.h>
#include <utf8proc.h>

namespace clusterfusion::cli {
namespace {

struct Character {
  utf8proc_int32_t codepoint;  // -1: the byte is ill-formed
  std::size_t size;            // in bytes
};

// The character at the start of `text`, which is not empty.
Character next_character(std::string_view text) {
  utf8proc_int32_t codepoint = -1;
  const auto size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                     static_cast<utf8proc_ssize_t>(text.size()), &codepoint);
  if (size <= 0) return {-1, 1};
  return {codepoint, static_cast<std::size_t>(size)};
}

bool is_control(utf8proc_int32_t codepoint) {
  switch (utf8proc_category(codepoint)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:  // among them the bidirectional overrides
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP: return true;
    default: return false;
  }
}

std::string escape(utf8proc_int32_t codepoint) {
  switch (codepoint) {
    case '\n': return "\\n";
    case '\r': return "\\r";
    case '\t': return "\\t";
    case '"': return "\\\"";
    case '\\': return "\\\\";
  }
  if (codepoint < 0x80) return fmt::format("\\x{:02x}", codepoint);
  if (codepoint <= 0xFFFF) return fmt::format("\\u{:04x}", codepoint);
  return fmt::format("\\U{:08x}", codepoint);
}

}  // namespace

std::optional<std::size_t> first_ill_formed_byte(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    const Character character = next_character(text.substr(at));
    if (character.codepoint < 0) return at;
    at += character.size;
  }
  return std::nullopt;
}

std::string quote(std::string_view bytes) {
  std::string quoted = "\"";
  while (!bytes.empty()) {
    const auto [codepoint, size] = next_character(bytes);
    if (codepoint < 0) {
      quoted += fmt::format("\\x{:02x}", static_cast<unsigned char>(bytes.front()));
    } else if (codepoint == '"' || codepoint == '\\' || is_control(codepoint)) {
      quoted += escape(codepoint);
    } else {
      quoted += bytes.substr(0, size);
    }
    bytes.remove_prefix(size);
  }
  return quoted + '"';
}

}  // namespace clusterfusion::cli
