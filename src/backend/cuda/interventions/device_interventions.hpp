// Interventions on a GPU.
//
// In a prefill kernels of their own add steering vectors between the layers. In a decode step
// steering moves no byte more: what is added to the residual stream before layer l + 1 is added to
// the biases of the second MLP matrix of layer l, which reach the residual stream anyway and in
// float32; a launch is pointed at a second place for these biases (DeviceModel::steered_biases()).
// Before layer 0 the vector goes to the embedding. An ablated MLP has zeros for activations and no
// bias; an ablated head writes zeros.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "backend/cuda/device_model.hpp"
#include "backend/cuda/interventions/ablation_bits.hpp"
#include "backend/cuda/interventions/intervention_kernels.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/interventions.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// What a launch of a decode kernel is told of interventions: the fields of these names in its
// parameters, the biases in first_layer.
struct LaunchInterventions {
  const char* mlp_down_bias = nullptr;
  const float* first_steering = nullptr;
  AblationBits ablated{};

  template <typename Params>
  void tell(Params& params) const {
    params.first_layer.mlp_down_bias = mlp_down_bias;
    params.first_steering = first_steering;
    params.ablated = ablated;
  }
};

// One sequence's, or several sequences', on the device.
class DeviceInterventions {
 public:
  // Errors: out_of_memory; unsupported (ablation in a model of more heads or layers than
  // AblationBits has).
  DeviceInterventions(std::shared_ptr<const Interventions> source, const ModelConfig& config,
                      cudaStream_t stream);

  const std::shared_ptr<const Interventions>& source() const noexcept { return source_; }
  const LayerIntervention& layer(std::int64_t index) const {
    return source_->layers[static_cast<std::size_t>(index)];
  }
  const DeviceSteering& steering(std::int64_t layer) const {
    return steering_[static_cast<std::size_t>(layer)];
  }

  // Decode steps from here on are steered alike; those before, each as its position is.
  std::int64_t steered_positions() const noexcept { return steered_positions_; }
  const AblationBits& ablated() const noexcept { return ablated_; }
  // On the device, [layers].
  const DeviceSteering* steering_table() const noexcept { return tables_.as<DeviceSteering>(); }
  const std::int32_t* ablated_mlps() const noexcept { return ablated_mlps_; }

 private:
  void set_bits(const ModelConfig& config);
  void upload(cudaStream_t stream);

  std::shared_ptr<const Interventions> source_;
  std::int64_t steered_positions_;
  AblationBits ablated_{};
  std::vector<DeviceSteering> steering_;  // pointers into values_
  DeviceMemory values_, tables_;
  const std::int32_t* ablated_mlps_ = nullptr;  // in tables_
};

// A backend's, with the place for biases that its launches share.
class InterventionTable {
 public:
  InterventionTable(const ModelConfig& config, const DeviceModel& weights)
      : config_(config), weights_(weights) {}

  // `source` on the device, there once while anybody holds it; null for null. Errors: those of
  // DeviceInterventions.
  std::shared_ptr<DeviceInterventions> on_device(const std::shared_ptr<const Interventions>& source,
                                                 cudaStream_t stream);

  // For a decode step at `position`, which is to be enqueued next on the same stream. Enqueues what
  // it needs.
  LaunchInterventions at_step(const std::shared_ptr<DeviceInterventions>& interventions,
                              std::int64_t position, cudaStream_t stream);

 private:
  void write_biases(const DeviceInterventions& interventions, std::int64_t position,
                    cudaStream_t stream);

  const ModelConfig& config_;
  const DeviceModel& weights_;
  std::vector<std::weak_ptr<DeviceInterventions>> known_;
  // What the biases are those of: kept, so that requests that follow each other find it there.
  std::shared_ptr<DeviceInterventions> written_;
  std::int64_t written_position_ = -1;
};

}  // namespace clusterfusion::cuda
