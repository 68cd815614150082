// Steering vectors and ablations for tests.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "backend/interventions.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::test {

inline std::vector<float> random_steering(std::int64_t count, unsigned seed, float size = 1.0f) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-size, size);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = uniform(random);
  return values;
}

// No intervention yet, but a place for each.
inline std::shared_ptr<Interventions> no_interventions(const ModelConfig& config) {
  auto interventions = std::make_shared<Interventions>();
  interventions->layers.resize(static_cast<std::size_t>(config.num_layers));
  return interventions;
}

// A vector for every position before each of these layers.
inline std::shared_ptr<Interventions> steered(const ModelConfig& config,
                                              const std::vector<std::int64_t>& layers) {
  auto interventions = no_interventions(config);
  for (const std::int64_t layer : layers) {
    LayerIntervention& its = interventions->layers[static_cast<std::size_t>(layer)];
    its.steering = random_steering(config.hidden_size, static_cast<unsigned>(layer) + 1);
    its.steers_everywhere = true;
  }
  return interventions;
}

// A vector of its own for each of the first `positions` positions, before each of these layers.
inline std::shared_ptr<Interventions> steered_at(const ModelConfig& config,
                                                 const std::vector<std::int64_t>& layers,
                                                 std::int64_t positions) {
  auto interventions = no_interventions(config);
  for (const std::int64_t layer : layers) {
    LayerIntervention& its = interventions->layers[static_cast<std::size_t>(layer)];
    its.steering =
        random_steering(positions * config.hidden_size, static_cast<unsigned>(layer) + 101);
    its.steered_positions = positions;
  }
  return interventions;
}

}  // namespace clusterfusion::test
