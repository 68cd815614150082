// Rotary position embedding (Su et al., arXiv:2104.09864): the angle of pair i of a head at a
// position is position x theta^(-2i / rotary_dim), as in transformers. Computed in float64 and
// rounded once: with float32 angles, which transformers has, cosines are off by up to
// 7e-5 within 2048 positions.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clusterfusion/layer_spec.hpp"

namespace clusterfusion::plan {

class RotaryTable {
 public:
  struct Turn {
    float cos, sin;
  };

  explicit RotaryTable(const LayerSpec& spec) {
    const auto dim = static_cast<double>(spec.rotary_dim);
    for (std::int64_t i = 0; i < spec.rotary_dim; i += 2) {
      frequencies_.push_back(std::pow(spec.rope_theta, -static_cast<double>(i) / dim));
    }
  }

  // Values of a head that are rotated in pairs: i and i + pairs().
  std::size_t pairs() const noexcept { return frequencies_.size(); }

  Turn turn(std::int64_t position, std::size_t pair) const noexcept {
    const double angle = static_cast<double>(position) * frequencies_[pair];
    return {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))};
  }

 private:
  std::vector<double> frequencies_;
};

}  // namespace clusterfusion::plan
