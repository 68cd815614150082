// Which heads and MLPs a launch of a decode kernel leaves out: among its parameters, as bits, so
// that a look at them is none into memory.
#pragma once

#include <cstdint>

#include "sampling/host_device.hpp"

namespace clusterfusion::cuda {

// Heads of all layers together, and layers, that have a bit: GPT-NeoX-20B has 2816 and 44. The LM
// head's epoch, behind the last layer, has one too, which is never set.
inline constexpr std::int32_t kMaxAblationHeads = 4096;
inline constexpr std::int32_t kMaxAblationLayers = 127;

struct AblationBits {
  bool any;  // else no bit is looked at
  std::uint32_t heads[kMaxAblationHeads / 32];
  std::uint32_t mlps[(kMaxAblationLayers + 1) / 32];

  // Head number layer * num_heads + head.
  CF_HOST_DEVICE bool has_head(std::int32_t number) const {
    return any && (heads[number / 32] >> number % 32 & 1) != 0;
  }
  CF_HOST_DEVICE bool has_mlp(std::int32_t layer) const {
    return any && (mlps[layer / 32] >> layer % 32 & 1) != 0;
  }
};

}  // namespace clusterfusion::cuda
