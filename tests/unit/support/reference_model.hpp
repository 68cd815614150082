// GPT-NeoX in float64, written for a reader to check against transformers' modeling_gpt_neox.py.
// Runs on all usable cores.
#pragma once

#include <span>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion::test {

// Logits at every position: [tokens.size(), vocab_size]. Everything is float64 but the rotary
// angles, position x inverse frequency, which are float32 as in transformers.
std::vector<double> reference_logits(const Model& model, std::span<const TokenId> tokens);

// One activation in float64.
double reference_activation(Activation activation, double x);

}  // namespace clusterfusion::test
