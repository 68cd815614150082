#include "engine/intervention_state.hpp"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "base/fail.hpp"

namespace clusterfusion {
namespace {

void check_layer(std::int64_t layer, const ModelConfig& config, const char* what) {
  require(layer >= 0 && layer < config.num_layers, ErrorKind::out_of_range,
          "{}: layer {} is none of the model's, expected one in [0, {}]", what, layer,
          config.num_layers - 1);
}

// steering = scale x values
LayerIntervention scaled(SteeringVector vector, float scale, const ModelConfig& config) {
  const std::int64_t rows = std::max<std::int64_t>(vector.positions, 1);
  require(vector.positions >= 0, ErrorKind::invalid_argument,
          "steer: layer {}: the number of positions must be at least 0, got {}", vector.layer,
          vector.positions);
  require(std::ssize(vector.values) % rows == 0 &&
              std::ssize(vector.values) / rows == config.hidden_size,
          ErrorKind::invalid_argument,
          "steer: layer {}: expected a vector of {} numbers (the model's hidden_size), or "
          "[positions, {}], found {} numbers for {} position{}",
          vector.layer, config.hidden_size, config.hidden_size, vector.values.size(), rows,
          rows == 1 ? "" : "s");
  for (std::size_t i = 0; i < vector.values.size(); ++i) {
    const float value = vector.values[i] * scale;
    require(std::isfinite(value), ErrorKind::non_finite,
            "steer: layer {}: element {} is {}, and {} times the scale of {}; expected a finite "
            "number",
            vector.layer, i, vector.values[i], value, scale);
    vector.values[i] = value;
  }
  LayerIntervention result;
  result.steering = std::move(vector.values);
  result.steered_positions = vector.positions;
  result.steers_everywhere = vector.positions == 0;
  return result;
}

std::vector<std::int64_t> checked_heads(std::int64_t layer, std::vector<std::int64_t> heads,
                                        const ModelConfig& config) {
  for (const std::int64_t head : heads)
    require(head >= 0 && head < config.num_heads, ErrorKind::out_of_range,
            "ablate: layer {} has no head {}, expected one in [0, {}]", layer, head,
            config.num_heads - 1);
  std::ranges::sort(heads);
  const auto twice = std::ranges::adjacent_find(heads);
  require(twice == heads.end(), ErrorKind::invalid_argument,
          "ablate: head {} of layer {} is named twice", twice == heads.end() ? -1 : *twice, layer);
  return heads;
}

bool is_empty(const LayerIntervention& layer) {
  return layer.steering.empty() && layer.ablated_heads.empty() && !layer.ablates_mlp;
}

}  // namespace

template <typename Change>
void InterventionState::replace(const ModelConfig& config, Change change) {
  const std::lock_guard lock(mutex_);
  auto next = now_ ? std::make_shared<Interventions>(*now_) : std::make_shared<Interventions>();
  next->layers.resize(static_cast<std::size_t>(config.num_layers));
  change(*next);
  if (std::ranges::all_of(next->layers, is_empty)) next = nullptr;
  now_ = std::move(next);
}

void InterventionState::steer(const ModelConfig& config, std::vector<SteeringVector> vectors,
                              float scale) {
  require(std::isfinite(scale), ErrorKind::non_finite,
          "steer: the scale is {}, expected a finite number", scale);
  std::vector<LayerIntervention> steered(static_cast<std::size_t>(config.num_layers));
  std::set<std::int64_t> seen;
  for (SteeringVector& vector : vectors) {
    const std::int64_t layer = vector.layer;
    check_layer(layer, config, "steer");
    require(seen.insert(layer).second, ErrorKind::invalid_argument,
            "steer: layer {} is named twice; add up its vectors", layer);
    steered[static_cast<std::size_t>(layer)] = scaled(std::move(vector), scale, config);
  }
  replace(config, [&](Interventions& next) {
    for (std::size_t i = 0; i < steered.size(); ++i) {
      next.layers[i].steering = std::move(steered[i].steering);
      next.layers[i].steered_positions = steered[i].steered_positions;
      next.layers[i].steers_everywhere = steered[i].steers_everywhere;
    }
  });
}

void InterventionState::ablate(const ModelConfig& config, const Ablation& ablation) {
  std::vector<LayerIntervention> ablated(static_cast<std::size_t>(config.num_layers));
  for (const auto& [layer, heads] : ablation.heads) {
    check_layer(layer, config, "ablate");
    ablated[static_cast<std::size_t>(layer)].ablated_heads = checked_heads(layer, heads, config);
  }
  for (const std::int64_t layer : ablation.mlps) {
    check_layer(layer, config, "ablate");
    bool& ablates = ablated[static_cast<std::size_t>(layer)].ablates_mlp;
    require(!ablates, ErrorKind::invalid_argument, "ablate: the MLP of layer {} is named twice",
            layer);
    ablates = true;
  }
  replace(config, [&](Interventions& next) {
    for (std::size_t i = 0; i < ablated.size(); ++i) {
      next.layers[i].ablated_heads = std::move(ablated[i].ablated_heads);
      next.layers[i].ablates_mlp = ablated[i].ablates_mlp;
    }
  });
}

std::shared_ptr<const Interventions> InterventionState::now() const {
  const std::lock_guard lock(mutex_);
  return now_;
}

}  // namespace clusterfusion
