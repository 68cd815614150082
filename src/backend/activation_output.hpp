// Activations that a prefill hands out.
#pragma once

#include <cstdint>
#include <vector>

namespace clusterfusion {

enum class ActivationKind {
  residual_before,  // of a layer, steering included
  attention_out,    // projected, with bias
  mlp_out,          // with bias
  residual_after,   // of a layer
  final_norm        // the residual stream behind the last layer, normalised; `layer` is 0
};

struct ActivationSite {
  ActivationKind kind = ActivationKind::residual_before;
  std::int64_t layer = 0;
  bool operator==(const ActivationSite&) const = default;
};

struct ActivationOutput {
  ActivationSite site;
  float* rows =
      nullptr;  // [tokens, hidden] on the backend's device: Backend::allocate_activation()
};

// For the tokens from `first` on.
inline std::vector<ActivationOutput> rows_from(std::int64_t first, std::int64_t hidden,
                                               std::vector<ActivationOutput> outputs) {
  for (ActivationOutput& output : outputs) output.rows += first * hidden;
  return outputs;
}

}  // namespace clusterfusion
