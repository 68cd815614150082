// Rotary position embedding (Su et al., arXiv:2104.09864): the angle of pair i of a head at a
// position is position x theta^(-2i / rotary_dim), as in transformers. Inverse frequencies and
// angles are float32, as there.
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
    for (std::int64_t i = 0; i < spec.rotary_dim; i += 2) {
      const float exponent = static_cast<float>(i) / static_cast<float>(spec.rotary_dim);
      const float power =
          static_cast<float>(std::pow(spec.rope_theta, static_cast<double>(exponent)));
      frequencies_.push_back(1.0f / power);
    }
  }

  // Values of a head that are rotated in pairs: i and i + pairs().
  std::size_t pairs() const noexcept { return frequencies_.size(); }

  Turn turn(std::int64_t position, std::size_t pair) const noexcept {
    const float angle = static_cast<float>(position) * frequencies_[pair];
    return {static_cast<float>(std::cos(static_cast<double>(angle))),
            static_cast<float>(std::sin(static_cast<double>(angle)))};
  }

 private:
  std::vector<float> frequencies_;
};

}  // namespace clusterfusion::plan
