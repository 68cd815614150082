// config.json and generation_config.json of a checkpoint.
#pragma once

#include <string>
#include <string_view>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// Reads a config.json, in the spelling of any version of transformers; a missing key means what it
// means to transformers 5, except that the sizes of the model must be there.
// `dtype` of the result is left alone: the tensors decide. `file` stands for the text in messages.
// Errors: malformed; unsupported, by name, for anything that this library cannot run.
ModelConfig parse_config(std::string_view json, const std::string& file);

// The activation that a spelling of `hidden_act` names.
// Errors: unsupported, a message that begins with `where` and lists the known names.
Activation parse_activation(std::string_view name, std::string_view where);

// Takes over the tokens that a generation_config.json names, as transformers' generate() does:
// where it says something, config.json's word on them does not count.
// Errors: malformed.
void apply_generation_config(std::string_view json, const std::string& file, ModelConfig& config);

// What a generation_config.json says of sampling and lengths. Errors: malformed.
GenerationConfig parse_generation_config(std::string_view json, const std::string& file);

}  // namespace clusterfusion
