#include "clusterfusion/ops.hpp"

#include "ops/check.hpp"

namespace clusterfusion::ops {
namespace {

void run(const Checked& checked, void* stream) {
  if (checked.device.device_type == kDLCPU) return cpu::run_layer(checked.work);
  cuda::run_layer(checked.work, {checked.device.device_id, stream});
}

}  // namespace

void attention_mlp_up(const LayerTensors& tensors, const LayerOptions& options,
                      const AttentionMlpUpResults& results, void* stream,
                      const ExpectedSizes& expected) {
  run(check(tensors, options, expected, &results), stream);
}

void mlp_down(const MlpDownTensors& tensors, const DLTensor& output, void* stream,
              const ExpectedSizes& expected) {
  run(check(tensors, expected, &output), stream);
}

void decoder_layer(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                   const DLTensor& mlp_down_bias, const LayerOptions& options,
                   const DecoderLayerResults& results, DecoderLayerVariant variant, void* stream,
                   const ExpectedSizes& expected) {
  Checked checked = check(tensors, mlp_down_weight, mlp_down_bias, options, expected, &results);
  checked.work.split = variant == DecoderLayerVariant::split;
  run(checked, stream);
}

}  // namespace clusterfusion::ops
