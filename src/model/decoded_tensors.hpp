// What a decode step reads of a model's weights.
#pragma once

#include "base/tensor_view.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion {

// Calls visit(tensor) for everything that one decode step reads, but for the embedding's one row.
template <typename Visit>
void for_each_decoded_tensor(const ModelWeights& weights, const Visit& visit) {
  const auto visit_present = [&](const DLTensor& tensor) {
    if (is_present(tensor)) visit(tensor);
  };
  for (const LayerWeights& layer : weights.layers) {
    for (const DLTensor& tensor : layer.tensors) visit_present(tensor);
  }
  visit_present(weights.final_norm_weight);
  visit_present(weights.final_norm_bias);
  visit_present(weights.lm_head);
}

}  // namespace clusterfusion
