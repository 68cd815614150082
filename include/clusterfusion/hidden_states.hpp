// Activations of a model, by their names.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace clusterfusion {

// Which activations are wanted. Names are those of TransformerLens, of transformers' result
// `hidden_states` and of transformers' modules (whose output is meant), with "*" for the number of
// a layer; a name with "*" stands for each of `layers`, a name with a number for that one.
//   blocks.*.hook_resid_pre   hidden_states[*]   the residual stream before a layer, steering
//                                                included; hidden_states[num_layers] is
//                                                what comes out of the final LayerNorm
//   blocks.*.hook_attn_out    gpt_neox.layers.*.attention   attention's output, projected, with
//   bias blocks.*.hook_mlp_out     gpt_neox.layers.*.mlp         the MLP's output
//   blocks.*.hook_resid_post  gpt_neox.layers.*             the residual stream behind a layer
//   ln_final.hook_normalized  gpt_neox.final_layer_norm     what the LM head reads
// "hook_resid_pre" alone is "blocks.*.hook_resid_pre", and so on. The whole table stands in
// src/engine/activation_names.cpp. TransformerLens' numbers are equal with
// HookedTransformer.from_pretrained_no_processing(); its other loaders change the weights.
struct HiddenStatesOptions {
  std::vector<std::string> at = {"hidden_states[*]"};
  std::optional<std::vector<std::int64_t>> layers;  // nothing: all
};

// A tensor with its memory: float32 [tokens, hidden_size], row-major, on the engine's device. It
// may outlive the engine.
struct NamedActivation {
  std::string name;  // with the layer's number
  std::shared_ptr<const DLTensor> values;
};

}  // namespace clusterfusion
