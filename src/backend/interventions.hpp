// Interventions as the devices take them: checked, scaled, one entry for each layer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace clusterfusion {

struct LayerIntervention {
  // float32 [steered_positions, hidden], to be added before the layer at these positions; one row
  // for all positions if `steers_everywhere`.
  std::vector<float> steering;
  std::int64_t steered_positions = 0;
  bool steers_everywhere = false;
  std::vector<std::int64_t> ablated_heads;  // ascending
  bool ablates_mlp = false;

  // What is to be added at `position`: float32 [hidden], or null for nothing.
  const float* steering_at(std::int64_t position, std::int64_t hidden) const noexcept {
    if (steering.empty()) return nullptr;
    if (steers_everywhere) return steering.data();
    return position < steered_positions ? steering.data() + position * hidden : nullptr;
  }
};

// Of one sequence, from its beginning to its end. There is something in it.
struct Interventions {
  std::vector<LayerIntervention> layers;  // all of the model's

  // Behind the last position that is steered by itself: from here on all are steered alike.
  std::int64_t steered_positions() const noexcept {
    std::int64_t positions = 0;
    for (const LayerIntervention& layer : layers)
      if (!layer.steers_everywhere) positions = std::max(positions, layer.steered_positions);
    return positions;
  }
  bool steers_everywhere() const noexcept {
    return std::ranges::any_of(layers, &LayerIntervention::steers_everywhere);
  }
};

}  // namespace clusterfusion
