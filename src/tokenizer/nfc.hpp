// Unicode normalization form C.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace clusterfusion {

// NFC of well-formed UTF-8, or nothing if `text` already is its own NFC form as far as a quick look
// can tell. Follows the Unicode version of tokenizers: what that version does not know stays as it
// is, whatever version utf8proc has.
std::optional<std::string> to_nfc(std::string_view text);

}  // namespace clusterfusion
