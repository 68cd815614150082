// The names that activations go by elsewhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend/activation_output.hpp"
#include "clusterfusion/hidden_states.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion {

struct NamedSite {
  std::string name;  // with the layer's number
  ActivationSite site;
};

// What `options` ask for of a model, whose family gives transformers' names of modules, in the
// order of the names and the layers. Errors: invalid_argument (an unknown name, with the list of
// those that are known; layers that no name has a place for; nothing asked for), out_of_range (a
// layer).
std::vector<NamedSite> sites_of(const HiddenStatesOptions& options, const ModelConfig& config);

}  // namespace clusterfusion
