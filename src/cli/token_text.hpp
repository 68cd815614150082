// Text and tokens shown to a person: escapes, and where text is not UTF-8.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace clusterfusion::cli {

// Index of the first byte of `text` that is not part of well-formed UTF-8.
std::optional<std::size_t> first_ill_formed_byte(std::string_view text);

// `bytes` in double quotes as one printable line: control characters, quotes and backslashes are
// escaped as in C, bytes that are not part of well-formed UTF-8 as \xHH.
std::string quote(std::string_view bytes);

}  // namespace clusterfusion::cli
