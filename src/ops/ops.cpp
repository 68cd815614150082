#include "clusterfusion/ops.hpp"

#include "ops/check.hpp"

namespace clusterfusion::ops {
namespace {

bool is_cpu(DLDevice device) { return device.device_type == kDLCPU; }

}  // namespace

void attention_mlp_up(const LayerTensors& tensors, const LayerOptions& options,
                      const AttentionMlpUpResults& results, void* stream,
                      const ExpectedSizes& expected) {
  const auto [task, device] = check(tensors, options, expected, &results);
  if (is_cpu(device)) return cpu::attention_mlp_up(task);
  cuda::attention_mlp_up(task, {device.device_id, stream});
}

void mlp_down(const MlpDownTensors& tensors, const DLTensor& output, void* stream,
              const ExpectedSizes& expected) {
  const auto [task, device] = check(tensors, expected, &output);
  if (is_cpu(device)) return cpu::mlp_down(task);
  cuda::mlp_down(task, {device.device_id, stream});
}

void decoder_layer(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                   const DLTensor& mlp_down_bias, const LayerOptions& options,
                   const DecoderLayerResults& results, DecoderLayerVariant variant, void* stream,
                   const ExpectedSizes& expected) {
  auto [task, device] = check(tensors, mlp_down_weight, mlp_down_bias, options, expected, &results);
  task.split = variant == DecoderLayerVariant::split;
  if (is_cpu(device)) return cpu::decoder_layer(task);
  cuda::decoder_layer(task, {device.device_id, stream});
}

}  // namespace clusterfusion::ops
