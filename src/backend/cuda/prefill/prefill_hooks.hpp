// What is done to a prefill, and read from it, beside computing it: interventions of its sequence,
// and activations that somebody asked for. Prefill calls this at named points; it enqueues.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "backend/activation_output.hpp"
#include "backend/cuda/interventions/device_interventions.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

class PrefillHooks {
 public:
  enum class Branch { attention, mlp };  // that adds to the residual stream

  // Of `count` tokens from first_position on. `interventions` may be null.
  PrefillHooks(const ModelConfig& config, const DeviceInterventions* interventions,
               std::span<const ActivationOutput> activations, std::int64_t first_position,
               std::int64_t count)
      : config_(config),
        interventions_(interventions),
        activations_(activations),
        first_position_(first_position),
        count_(count) {}

  bool empty() const noexcept { return interventions_ == nullptr && activations_.empty(); }

  // Rows are those of the tokens, float32 [hidden] unless it says otherwise.
  // The residual stream in front of a layer: adds to it what steers, and hands it out.
  void before_layer(std::int64_t layer, float* residual, cudaStream_t stream) const;
  // The heads' outputs, 16-bit [heads, head_dim] a row: ablated ones become zero.
  void at_heads(std::int64_t layer, void* heads, cudaStream_t stream) const;
  bool ablates_mlp(std::int64_t layer) const {
    return interventions_ != nullptr && interventions_->layer(layer).ablates_mlp;
  }
  // Whether at_branch() hands anything out; then the branch has to be computed by itself.
  bool look_at_branch(Branch branch, std::int64_t layer) const { return want(site(branch, layer)); }
  // What a branch adds to the residual stream; null: nothing, because it is ablated.
  void at_branch(Branch branch, std::int64_t layer, const float* rows, cudaStream_t stream) const;
  void after_layer(std::int64_t layer, const float* residual, cudaStream_t stream) const;
  // Behind the last layer.
  void at_final_norm(const float* residual, const DeviceModel& weights, cudaStream_t stream) const;

 private:
  static ActivationSite site(Branch branch, std::int64_t layer) {
    return {branch == Branch::mlp ? ActivationKind::mlp_out : ActivationKind::attention_out, layer};
  }
  bool want(const ActivationSite& site) const;
  void hand_out(const ActivationSite& site, const float* rows, cudaStream_t stream) const;

  const ModelConfig& config_;
  const DeviceInterventions* interventions_;
  std::span<const ActivationOutput> activations_;
  std::int64_t first_position_, count_;
};

}  // namespace clusterfusion::cuda
