#include "backend/cuda/prefill/prefill_hooks.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {

void PrefillHooks::before_layer(std::int64_t layer, float* residual, cudaStream_t stream) const {
  if (interventions_ != nullptr && interventions_->steering(layer).rows != nullptr)
    launch_steer(residual, interventions_->steering(layer), first_position_, count_,
                 config_.hidden_size, stream);
  hand_out({ActivationKind::residual_before, layer}, residual, stream);
}

void PrefillHooks::at_heads(std::int64_t layer, void* heads, cudaStream_t stream) const {
  if (interventions_ == nullptr) return;
  const auto head_bytes = static_cast<std::size_t>(config_.head_dim) * 2;
  for (const std::int64_t head : interventions_->layer(layer).ablated_heads)
    check(cudaMemset2DAsync(static_cast<char*>(heads) + head * config_.head_dim * 2,
                            static_cast<std::size_t>(config_.attention_size()) * 2, 0, head_bytes,
                            static_cast<std::size_t>(count_), stream),
          "ablating a head");
}

void PrefillHooks::at_branch(Branch branch, std::int64_t layer, const float* rows,
                             cudaStream_t stream) const {
  hand_out(site(branch, layer), rows, stream);
}

void PrefillHooks::after_layer(std::int64_t layer, const float* residual,
                               cudaStream_t stream) const {
  hand_out({ActivationKind::residual_after, layer}, residual, stream);
}

void PrefillHooks::at_final_norm(const float* residual, const DeviceModel& weights,
                                 cudaStream_t stream) const {
  for (const ActivationOutput& output : activations_)
    if (output.site.kind == ActivationKind::final_norm)
      launch_final_norm(config_.dtype, config_.norm, residual, weights.final_norm_weight(),
                        weights.final_norm_bias(), static_cast<float>(config_.layer_norm_eps),
                        output.rows, count_, config_.hidden_size, stream);
}

bool PrefillHooks::want(const ActivationSite& site) const {
  return std::ranges::count(activations_, site, &ActivationOutput::site) > 0;
}

void PrefillHooks::hand_out(const ActivationSite& site, const float* rows,
                            cudaStream_t stream) const {
  const auto bytes = static_cast<std::size_t>(count_ * config_.hidden_size) * sizeof(float);
  for (const ActivationOutput& output : activations_) {
    if (output.site != site) continue;
    const cudaError_t error = rows == nullptr ? cudaMemsetAsync(output.rows, 0, bytes, stream)
                                              : cudaMemcpyAsync(output.rows, rows, bytes,
                                                                cudaMemcpyDeviceToDevice, stream);
    check(error, "handing out activations");
  }
}

}  // namespace clusterfusion::cuda
