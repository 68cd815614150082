// The tensors of a layer: the one list that binding, upload, checks and searches walk.
#pragma once

#include <cstdint>
#include <vector>

#include "clusterfusion/layer_spec.hpp"

namespace clusterfusion {

struct LayerTensorShape {
  LayerTensor tensor;
  std::vector<std::int64_t> shape;  // a vector's size, or a matrix's rows and columns
};

// Those that a layer of `spec` has, in the order of LayerTensor.
inline std::vector<LayerTensorShape> layer_tensors(const LayerSpec& spec) {
  std::vector<LayerTensorShape> list;
  const auto add = [&](LayerTensor weight, std::vector<std::int64_t> shape, bool has_bias) {
    list.push_back({weight, shape});
    if (has_bias) list.push_back({bias_of(weight), {shape[0]}});
  };
  const std::int64_t hidden = spec.hidden_size;
  const std::int64_t inner = spec.intermediate_size;
  const bool norm_bias = spec.norm == NormKind::layer_norm;
  add(LayerTensor::input_norm_weight, {hidden}, norm_bias);
  add(LayerTensor::post_norm_weight, {hidden}, norm_bias);
  const bool is_separate = spec.qkv_layout == QkvLayout::separate;
  if (!is_separate) add(LayerTensor::qkv_weight, {spec.qkv_size(), hidden}, spec.attention_bias);
  if (spec.gated_mlp) add(LayerTensor::mlp_gate_weight, {inner, hidden}, spec.mlp_bias);
  add(LayerTensor::mlp_up_weight, {inner, hidden}, spec.mlp_bias);
  add(LayerTensor::mlp_down_weight, {hidden, inner}, spec.mlp_bias);
  add(LayerTensor::attention_out_weight, {hidden, spec.attention_size()},
      spec.attention_bias && spec.attention_out_bias);
  if (is_separate) {
    add(LayerTensor::query_weight, {spec.attention_size(), hidden}, spec.attention_bias);
    add(LayerTensor::key_weight, {spec.kv_size(), hidden}, spec.attention_bias);
    add(LayerTensor::value_weight, {spec.kv_size(), hidden}, spec.attention_bias);
  }
  if (spec.qk_norm) {
    add(LayerTensor::query_norm_weight, {spec.head_dim}, false);
    add(LayerTensor::key_norm_weight, {spec.head_dim}, false);
  }
  return list;
}

}  // namespace clusterfusion
