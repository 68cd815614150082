// The byte-level alphabet: tokenizer.json spells each byte of a token as one printable character.
// Source: GPT-2's bytes_to_unicode (openai/gpt-2, src/encoder.py).
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace clusterfusion {

// The spelling of one byte: itself if it is printable in Latin-1, else U+0100, U+0101, ... in
// order.
std::string spell_byte(unsigned char byte);

// The bytes that a spelled token stands for, or nothing if a character is not of the alphabet.
// `spelled` must be well-formed UTF-8.
std::optional<std::string> unspell_bytes(std::string_view spelled);

}  // namespace clusterfusion
