// A family of models: how its config.json and its tensors are to be read. Adding one is a file
// beside this one, and a line in family.cpp.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"
#include "io/json.hpp"

namespace clusterfusion {

// Modules as the family's checkpoints spell them; behind each comes ".weight" or ".bias".
struct TensorNames {
  std::string_view prefix;  // of all but the LM head; base models are saved without it
  std::string_view embedding;
  std::string_view layers;  // of layer i: "LAYERS.i.MODULE.weight"
  // By the weight's LayerTensor / 2; empty where the family has none.
  std::array<std::string_view, kNumLayerTensors / 2> layer;
  std::string_view final_norm;
  std::vector<std::string_view> lm_head;  // spellings: a checkpoint has one of them, or none
  // Ends of the names of tensors that are passed over: buffers that old versions saved.
  std::vector<std::string_view> ignored;

  // Behind "LAYERS.i.".
  std::string name_of(LayerTensor tensor) const {
    return std::string(layer[index_of(tensor) / 2]) + (is_bias(tensor) ? ".bias" : ".weight");
  }
};

struct Family {
  std::string_view model_type;                  // of config.json
  std::vector<std::string_view> architectures;  // likewise; the one with an LM head first
  // Reads all but model_type and dtype. Errors: malformed, unsupported.
  void (*read_config)(const JsonObject& root, const std::string& file, ModelConfig& config);
  TensorNames names;
};

// The family that a config.json names. Errors: malformed, unsupported.
const Family& family_of(const JsonObject& root, const std::string& file);
// The family of a ModelConfig::model_type. Errors: internal.
const Family& family_of(const ModelConfig& config);
// From now on models of this family can be opened. Not while another thread opens one.
void add_family(const Family& family);

const Family& gpt_neox_family();
const Family& llama_family();
const Family& mistral_family();
const Family& qwen2_family();
const Family& qwen3_family();

}  // namespace clusterfusion
