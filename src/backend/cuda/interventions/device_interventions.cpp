#include "backend/cuda/interventions/device_interventions.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

void copy_to_device(void* to, const void* from, std::size_t bytes, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "sending interventions");
}

}  // namespace

DeviceInterventions::DeviceInterventions(std::shared_ptr<const Interventions> source,
                                         const ModelConfig& config, cudaStream_t stream)
    : source_(std::move(source)),
      steered_positions_(source_->steered_positions()),
      steering_(source_->layers.size()) {
  set_bits(config);
  upload(stream);
}

void DeviceInterventions::set_bits(const ModelConfig& config) {
  for (std::int64_t index = 0; index < config.num_layers; ++index) {
    const LayerIntervention& its = layer(index);
    if (its.ablated_heads.empty() && !its.ablates_mlp) continue;
    require(config.num_layers <= kMaxAblationLayers &&
                config.num_layers * config.num_heads <= kMaxAblationHeads,
            ErrorKind::unsupported,
            "ablation on a GPU: expected a model of at most {} layers and {} heads in all, found "
            "{} layers of {} heads; use device \"cpu\"",
            kMaxAblationLayers, kMaxAblationHeads, config.num_layers, config.num_heads);
    ablated_.any = true;
    if (its.ablates_mlp) ablated_.mlps[index / 32] |= 1u << index % 32;
    for (const std::int64_t head : its.ablated_heads) {
      const std::int64_t number = index * config.num_heads + head;
      ablated_.heads[number / 32] |= 1u << number % 32;
    }
  }
}

// All vectors one after the other; then the tables that name them.
void DeviceInterventions::upload(cudaStream_t stream) {
  std::int64_t count = 0;
  for (const LayerIntervention& layer : source_->layers) count += std::ssize(layer.steering);
  values_ = DeviceMemory(count * 4, "steering vectors");
  std::vector<std::int32_t> ablated_mlps;
  float* next = values_.as<float>();
  for (std::size_t i = 0; i < source_->layers.size(); ++i) {
    const LayerIntervention& layer = source_->layers[i];
    ablated_mlps.push_back(layer.ablates_mlp);
    if (layer.steering.empty()) continue;
    copy_to_device(next, layer.steering.data(), layer.steering.size() * 4, stream);
    steering_[i] = {next, static_cast<std::int32_t>(layer.steered_positions),
                    layer.steers_everywhere};
    next += layer.steering.size();
  }
  const std::size_t steering_bytes = steering_.size() * sizeof(DeviceSteering);
  tables_ = DeviceMemory(static_cast<std::int64_t>(steering_bytes + ablated_mlps.size() * 4),
                         "tables of interventions");
  copy_to_device(tables_.as<>(), steering_.data(), steering_bytes, stream);
  copy_to_device(tables_.as<>() + steering_bytes, ablated_mlps.data(), ablated_mlps.size() * 4,
                 stream);
  ablated_mlps_ = reinterpret_cast<const std::int32_t*>(tables_.as<>() + steering_bytes);
  check(cudaStreamSynchronize(stream), "sending interventions");  // then what was sent may go
}

std::shared_ptr<DeviceInterventions> InterventionTable::on_device(
    const std::shared_ptr<const Interventions>& source, cudaStream_t stream) {
  if (source == nullptr) return nullptr;
  std::erase_if(known_, [](const auto& known) { return known.expired(); });
  for (const auto& known : known_) {
    if (auto found = known.lock(); found != nullptr && found->source() == source) return found;
  }
  auto made = std::make_shared<DeviceInterventions>(source, config_, stream);
  known_.push_back(made);
  return made;
}

LaunchInterventions InterventionTable::at_step(
    const std::shared_ptr<DeviceInterventions>& interventions, std::int64_t position,
    cudaStream_t stream) {
  LaunchInterventions launch;
  launch.mlp_down_bias = weights_.layers().front()[LayerTensor::mlp_down_bias];
  if (interventions == nullptr) return launch;
  const std::int64_t written = std::min(position, interventions->steered_positions());
  if (written_ != interventions || written_position_ != written) {
    write_biases(*interventions, written, stream);
    written_ = interventions;
    written_position_ = written;
  }
  launch.mlp_down_bias = weights_.steered_biases();
  launch.ablated = interventions->ablated();
  const DeviceSteering& first = interventions->steering(0);
  if (first.everywhere != 0)
    launch.first_steering = first.rows;
  else if (position < first.positions)
    launch.first_steering = first.rows + position * config_.hidden_size;
  return launch;
}

void InterventionTable::write_biases(const DeviceInterventions& interventions,
                                     std::int64_t position, cudaStream_t stream) {
  launch_steer_biases({.model_biases = weights_.layers().front()[LayerTensor::mlp_down_bias],
                       .steered_biases = weights_.steered_biases(),
                       .layer_stride = weights_.layer_stride(),
                       .steering = interventions.steering_table(),
                       .ablated_mlps = interventions.ablated_mlps(),
                       .layers = static_cast<std::int32_t>(config_.num_layers),
                       .hidden = static_cast<std::int32_t>(config_.hidden_size)},
                      static_cast<std::int32_t>(position), stream);
}

}  // namespace clusterfusion::cuda
