// Results as JSON. Keys are those of the C++ structures; they are part of the interface.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {

using Json = nlohmann::ordered_json;

Json to_json(const Statistics& statistics);
// `tokenizer` may be null; else tokens also carry "piece", their spelling in tokenizer.json (null
// if it has none).
Json to_json(const SampledToken& sampled, const Tokenizer* tokenizer, bool with_logprob);
Json to_json(const GenerateResult& result, const Tokenizer* tokenizer);
Json to_json(const LoglikelihoodResult& result, const Tokenizer& tokenizer);

// As one line. Bytes that are not UTF-8 (paths may hold such) become U+FFFD.
std::string to_line(const Json& json);

}  // namespace clusterfusion::cli
