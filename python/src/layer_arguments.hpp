// The arguments of the layer calls, in the order in which Python passes them: tensors in the order
// of the Python function, position, options, expected sizes; in the general calls the options that
// most calls leave out; then results.
//
// A reader takes one argument after the other by name: tensor(), position(), other_position(),
// integer(), optional_integer(), number(), boolean(), activation(), norm().
#pragma once

#include "clusterfusion/ops.hpp"

namespace clusterfusion::python {

struct AttentionMlpUpArguments {
  ops::LayerTensors tensors;
  ops::LayerOptions options;
  ops::ExpectedSizes expected;
};

struct MlpDownArguments {
  ops::MlpDownTensors tensors;
  ops::ExpectedSizes expected;
};

struct DecoderLayerArguments {
  ops::LayerTensors tensors;
  DLTensor mlp_down_weight{};
  DLTensor mlp_down_bias{};
  ops::LayerOptions options;
  ops::DecoderLayerVariant variant = ops::DecoderLayerVariant::fused;
  ops::ExpectedSizes expected;
};

template <typename Reader>
void read(Reader& in, ops::LayerTensors& tensors) {
  tensors.input = in.tensor("input");
  tensors.weight_qkv = in.tensor("weight_qkv");
  tensors.bias_qkv = in.tensor("bias_qkv");
  tensors.weight_o = in.tensor("weight_o");
  tensors.bias_o = in.tensor("bias_o");
  tensors.k_cache = in.tensor("k_cache");
  tensors.v_cache = in.tensor("v_cache");
  tensors.ln_weight = in.tensor("ln_weight");
  tensors.ln_bias = in.tensor("ln_bias");
  tensors.cos = in.tensor("cos");
  tensors.sin = in.tensor("sin");
  tensors.post_ln_weight = in.tensor("post_ln_weight");
  tensors.post_ln_bias = in.tensor("post_ln_bias");
  tensors.mlp_up_weight = in.tensor("mlp_up_weight");
  tensors.mlp_up_bias = in.tensor("mlp_up_bias");
}

template <typename Reader>
void read(Reader& in, ops::LayerOptions& options) {
  options.num_heads = in.integer("num_heads");
  options.rotary_dim = in.optional_integer("rotary_dim");
  options.layer_norm_eps = in.number("layer_norm_eps");
  options.activation = in.activation("activation");
}

// What only the general calls have. They take longer, which the others are spared.
template <typename Reader>
void read_more(Reader& in, ops::LayerTensors& tensors, ops::LayerOptions& options) {
  in.other_position("positions", tensors.current_seq_len);
  tensors.block_table = in.tensor("block_table");
  options.num_kv_heads = in.optional_integer("num_kv_heads");
  options.head_dim = in.optional_integer("head_dim");
  options.qkv_weight_interleaved = in.boolean("qkv_weight_interleaved");
  options.norm = in.norm("norm");
  options.gated = in.boolean("gated");
  options.parallel_residual = in.boolean("parallel_residual");
  tensors.q_norm_weight = in.tensor("q_norm_weight");
  tensors.k_norm_weight = in.tensor("k_norm_weight");
}

template <typename Reader>
void read(Reader& in, ops::ExpectedSizes& expected) {
  expected.hidden = in.integer("hidden_size");
  expected.intermediate = in.integer("intermediate_size");
}

template <typename Reader>
void read(Reader& in, AttentionMlpUpArguments& arguments) {
  read(in, arguments.tensors);
  arguments.tensors.current_seq_len = in.position("current_seq_len");
  read(in, arguments.options);
  read(in, arguments.expected);
}

template <typename Reader>
void read(Reader& in, MlpDownArguments& arguments) {
  arguments.tensors.hidden_states = in.tensor("hidden_states");
  arguments.tensors.attn_output = in.tensor("attn_output");
  arguments.tensors.mlp_intermediate = in.tensor("mlp_intermediate");
  arguments.tensors.mlp_down_weight = in.tensor("mlp_down_weight");
  arguments.tensors.mlp_down_bias = in.tensor("mlp_down_bias");
  read(in, arguments.expected);
}

template <typename Reader>
void read(Reader& in, DecoderLayerArguments& arguments) {
  read(in, arguments.tensors);
  arguments.mlp_down_weight = in.tensor("mlp_down_weight");
  arguments.mlp_down_bias = in.tensor("mlp_down_bias");
  arguments.tensors.current_seq_len = in.position("current_seq_len");
  read(in, arguments.options);
  arguments.variant =
      in.boolean("split") ? ops::DecoderLayerVariant::split : ops::DecoderLayerVariant::fused;
  read(in, arguments.expected);
}

template <typename Reader>
void read(Reader& in, ops::AttentionMlpUpResults& results) {
  results.attn_output = in.tensor("attn_output");
  results.mlp_intermediate = in.tensor("mlp_intermediate");
  results.k_new = in.tensor("k_new");
  results.v_new = in.tensor("v_new");
}

template <typename Reader>
void read(Reader& in, ops::DecoderLayerResults& results) {
  results.output = in.tensor("output");
  results.k_new = in.tensor("k_new");
  results.v_new = in.tensor("v_new");
}

// mlp_down has one result.
template <typename Reader>
void read(Reader& in, DLTensor& output) {
  output = in.tensor("output");
}

}  // namespace clusterfusion::python
