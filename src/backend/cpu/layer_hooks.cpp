#include "backend/cpu/layer_hooks.hpp"

#include <algorithm>

namespace clusterfusion::cpu {
namespace {

const LayerIntervention* intervention_of(const LayerHooks::Part& part, std::int64_t layer) {
  if (part.interventions == nullptr) return nullptr;
  return &part.interventions->layers[static_cast<std::size_t>(layer)];
}

bool ablates_mlp(const LayerHooks::Part& part, std::int64_t layer) {
  const LayerIntervention* intervention = intervention_of(part, layer);
  return intervention != nullptr && intervention->ablates_mlp;
}

}  // namespace

void LayerHooks::add(const Part& part) {
  if (part.interventions != nullptr || !part.activations.empty()) parts_.push_back(part);
}

void LayerHooks::before_layer(std::int64_t layer, HookedRows residual) const {
  for (const Part& part : parts_) {
    const LayerIntervention* intervention = intervention_of(part, layer);
    for (std::int64_t i = 0; intervention != nullptr && i < part.count; ++i) {
      const float* steering =
          intervention->steering_at(part.first_position + i, config_.hidden_size);
      if (steering == nullptr) break;
      float* row = residual.row(part.first_row + i);
      for (std::int64_t k = 0; k < config_.hidden_size; ++k) row[k] += steering[k];
    }
  }
  hand_out({ActivationKind::residual_before, layer}, residual);
}

void LayerHooks::at_heads(std::int64_t layer, HookedRows heads) const {
  for (const Part& part : parts_) {
    const LayerIntervention* intervention = intervention_of(part, layer);
    if (intervention == nullptr) continue;
    for (const std::int64_t head : intervention->ablated_heads)
      for (std::int64_t i = 0; i < part.count; ++i)
        std::fill_n(heads.row(part.first_row + i) + head * config_.head_dim, config_.head_dim,
                    0.0f);
  }
}

bool LayerHooks::look_at_branches(std::int64_t layer) const {
  return std::ranges::any_of(parts_, [&](const Part& p) { return ablates_mlp(p, layer); }) ||
         want({ActivationKind::attention_out, layer}) || want({ActivationKind::mlp_out, layer});
}

void LayerHooks::at_branch(Branch branch, std::int64_t layer, HookedRows rows) const {
  if (branch == Branch::attention) return hand_out({ActivationKind::attention_out, layer}, rows);
  for (const Part& part : parts_) {
    if (!ablates_mlp(part, layer)) continue;
    for (std::int64_t i = 0; i < part.count; ++i)
      std::fill_n(rows.row(part.first_row + i), config_.hidden_size, 0.0f);
  }
  hand_out({ActivationKind::mlp_out, layer}, rows);
}

void LayerHooks::after_layer(std::int64_t layer, HookedRows residual) const {
  hand_out({ActivationKind::residual_after, layer}, residual);
}

void LayerHooks::at_final_norm(HookedRows rows) const {
  hand_out({ActivationKind::final_norm, 0}, rows);
}

bool LayerHooks::want(const ActivationSite& site) const {
  return std::ranges::any_of(parts_, [&](const Part& part) {
    return std::ranges::count(part.activations, site, &ActivationOutput::site) > 0;
  });
}

void LayerHooks::hand_out(const ActivationSite& site, HookedRows rows) const {
  for (const Part& part : parts_) {
    for (const ActivationOutput& output : part.activations) {
      if (output.site != site) continue;
      for (std::int64_t i = 0; i < part.count; ++i)
        std::copy_n(rows.row(part.first_row + i), config_.hidden_size,
                    output.rows + i * config_.hidden_size);
    }
  }
}

}  // namespace clusterfusion::cpu
