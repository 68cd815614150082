// Rotary position embedding (Su et al., arXiv:2104.09864): the angle of pair i of a head at a
// position is position x theta^(-2i / rotary_dim), or a frequency scaled for longer contexts
// (RopeScaling), as in transformers. Computed in float64 and rounded once: with float32 angles,
// which transformers has, cosines are off by up to 7e-5 within 2048 positions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clusterfusion/layer_spec.hpp"

namespace clusterfusion::plan {

// Radians per position of each pair, of which there are rotary_dim / 2.
std::vector<double> rotary_frequencies(const LayerSpec& spec);

class RotaryTable {
 public:
  // Both times RopeScaling::attention_factor.
  struct Turn {
    float cos, sin;
  };

  explicit RotaryTable(const LayerSpec& spec)
      : frequencies_(rotary_frequencies(spec)), factor_(spec.rope_scaling.attention_factor) {}

  // Values of a head that are rotated in pairs: i and i + pairs().
  std::size_t pairs() const noexcept { return frequencies_.size(); }

  Turn turn(std::int64_t position, std::size_t pair) const noexcept {
    const double angle = static_cast<double>(position) * frequencies_[pair];
    return {static_cast<float>(factor_ * std::cos(angle)),
            static_cast<float>(factor_ * std::sin(angle))};
  }

 private:
  std::vector<double> frequencies_;
  double factor_;
};

}  // namespace clusterfusion::plan
