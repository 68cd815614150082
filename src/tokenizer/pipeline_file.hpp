// Reading the "normalizer", "pre_tokenizer" and "decoder" of a tokenizer.json.
#pragma once

#include <string_view>
#include <vector>

#include "io/json.hpp"
#include "tokenizer/detokenizer.hpp"
#include "tokenizer/normalizer.hpp"
#include "tokenizer/pre_tokenizer.hpp"

namespace clusterfusion {

// Throws that what `value` holds is not supported, and what is.
[[noreturn]] void refuse_value(const JsonValue& value, std::string_view found,
                               std::string_view supported);
bool flag_or(const JsonObject& object, std::string_view key, bool absent);

// Errors of all: malformed, unsupported.
std::vector<NormalizerStep> read_normalizer(const JsonValue& value);
PreTokenizer read_pre_tokenizer(const JsonValue& value);
DecoderSpec read_decoder(const JsonValue& value);

}  // namespace clusterfusion
