// What the layer calls demand of their arguments, on every device.
#pragma once

#include "backend/layer_ops.hpp"
#include "clusterfusion/ops.hpp"

namespace clusterfusion::ops {

// Work whose arguments hold all that clusterfusion/ops.hpp demands, and where it is to run.
struct Checked {
  LayerWork work;
  DLDevice device{};
};

// Each checks the tensors and options, then the results; null results are left out of both. Errors:
// those of clusterfusion/ops.hpp.
Checked check(const LayerTensors& tensors, const LayerOptions& options,
              const ExpectedSizes& expected, const AttentionMlpUpResults* results);
Checked check(const MlpDownTensors& tensors, const ExpectedSizes& expected, const DLTensor* output);
Checked check(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
              const DLTensor& mlp_down_bias, const LayerOptions& options,
              const ExpectedSizes& expected, const DecoderLayerResults* results);

// The large tensors of a decoder layer alone: caches and matrices of `tensors`, and MLP-down's.
void check_graph_context(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                         const ExpectedSizes& expected);

}  // namespace clusterfusion::ops
