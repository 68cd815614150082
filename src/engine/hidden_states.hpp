// Activations of a text.
#pragma once

#include <span>
#include <vector>

#include "clusterfusion/hidden_states.hpp"
#include "engine/shared_backend.hpp"

namespace clusterfusion {

// Has the meaning and errors of its namesake in Engine.
std::vector<NamedActivation> compute_hidden_states(SharedBackend& backend,
                                                   std::span<const TokenId> tokens,
                                                   const HiddenStatesOptions& options);

}  // namespace clusterfusion
