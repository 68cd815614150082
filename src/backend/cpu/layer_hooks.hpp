// What is done to a run of the layers, and read from it, beside computing it: interventions of its
// sequences and activations that somebody asked for. The forward pass calls this at named points.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/activation_output.hpp"
#include "backend/interventions.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cpu {

// Rows of activations, a token each.
struct HookedRows {
  float* data = nullptr;
  std::int64_t stride = 0;
  float* row(std::int64_t r) const noexcept { return data + r * stride; }
};

class LayerHooks {
 public:
  enum class Branch { attention, mlp };  // that adds to the residual stream

  // Rows [first_row, first_row + count) of a run, at positions of one sequence that follow each
  // other.
  struct Part {
    std::int64_t first_row = 0, count = 0, first_position = 0;
    const Interventions* interventions = nullptr;  // or none
    std::span<const ActivationOutput> activations;
  };

  explicit LayerHooks(const ModelConfig& config) : config_(config) {}

  // Of the run that comes.
  void clear() { parts_.clear(); }
  void add(const Part& part);

  // The residual stream in front of a layer: adds to it what steers, and hands it out.
  void before_layer(std::int64_t layer, HookedRows residual) const;
  // The heads' outputs, [heads, head_dim] a row: ablated ones become zero.
  void at_heads(std::int64_t layer, HookedRows heads) const;
  // Whether at_branch() has anything to do for a layer.
  bool look_at_branches(std::int64_t layer) const;
  // What a branch is to add to the residual stream: ablated, it becomes zero; it is handed out.
  void at_branch(Branch branch, std::int64_t layer, HookedRows rows) const;
  void after_layer(std::int64_t layer, HookedRows residual) const;
  void at_final_norm(HookedRows rows) const;

  bool want(const ActivationSite& site) const;

 private:
  void hand_out(const ActivationSite& site, HookedRows rows) const;

  const ModelConfig& config_;
  std::vector<Part> parts_;  // those with something to do
};

}  // namespace clusterfusion::cpu
