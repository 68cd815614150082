// Unicode normalization forms C and KC.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace clusterfusion {

enum class NormalizationForm { nfc, nfkc };

// The form of well-formed UTF-8, or nothing if `text` already has it as far as a quick look can
// tell. Follows the Unicode version of tokenizers: what that version does not know stays as it is,
// whatever version utf8proc has.
std::optional<std::string> to_form(NormalizationForm form, std::string_view text);
inline std::optional<std::string> to_nfc(std::string_view text) {
  return to_form(NormalizationForm::nfc, text);
}

}  // namespace clusterfusion
