#include "ops/check.hpp"

#include <cmath>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "ops/tensor_checker.hpp"

namespace clusterfusion::ops {
namespace {

// Rows of a matrix that may have any number of them. An absent one has none: the checker says so.
std::int64_t rows_of(const DLTensor& tensor, const char* name, const char* meaning,
                     std::int64_t columns) {
  if (!is_present(tensor)) return 0;
  if (tensor.ndim != 2 || tensor.shape[0] < 1) {
    fail(ErrorKind::invalid_argument, "{}: expected shape [{}, {}], found {}", name, meaning,
         columns, shape_text(tensor));
  }
  return tensor.shape[0];
}

std::int64_t last_size(const DLTensor& tensor) {
  return tensor.ndim >= 1 ? tensor.shape[tensor.ndim - 1] : 0;
}

void check_heads(const LayerOptions& options, LayerShape& shape) {
  require(options.num_heads >= 1 && shape.hidden_size % options.num_heads == 0,
          ErrorKind::invalid_argument,
          "num_heads: expected a divisor of the hidden size {}, found {}", shape.hidden_size,
          options.num_heads);
  shape.num_heads = options.num_heads;
  shape.head_dim = shape.hidden_size / options.num_heads;
}

// rotary_dim values, or head_dim of which the first rotary_dim count.
void check_rotary(TensorChecker& checker, const LayerTensors& tensors, const LayerOptions& options,
                  LayerTask& task) {
  const std::int64_t head_dim = task.shape.head_dim;
  const std::int64_t found = last_size(tensors.cos);
  require(options.rotary_dim || found != head_dim, ErrorKind::invalid_argument,
          "rotary_dim: expected a number, because cos has as many values as a head ({}) and does "
          "not tell how many are rotated, found none",
          head_dim);
  const std::int64_t rotary_dim = options.rotary_dim.value_or(found);
  if (rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    require(!options.rotary_dim, ErrorKind::invalid_argument,
            "rotary_dim: expected an even number of 0 to {} (head_dim), found {}", head_dim,
            rotary_dim);
    fail(ErrorKind::invalid_argument,
         "cos: expected shape [rotary_dim], an even number of at most {} (head_dim), found {}",
         head_dim, shape_text(tensors.cos));
  }
  task.shape.rotary_dim = rotary_dim;
  const std::int64_t given = found == head_dim ? head_dim : rotary_dim;
  const char* meaning = given == head_dim ? "head_dim" : "rotary_dim";
  task.cos = checker.read_float32(tensors.cos, "cos", {{given, meaning}});
  task.sin = checker.read_float32(tensors.sin, "sin", {{given, meaning}});
}

void check_position(TensorChecker& checker, const Position& position, LayerTask& task) {
  constexpr const char* kName = "current_seq_len";
  std::int64_t value = position.value;
  if (is_present(position.tensor)) {
    const bool scalar = position.tensor.ndim == 0;
    const std::int32_t* where = scalar ? checker.read_int32(position.tensor, kName, {})
                                       : checker.read_int32(position.tensor, kName, {{1, "1"}});
    if (checker.device().device_type != kDLCPU) {
      task.device_position = where;
      return;
    }
    value = *where;
  }
  const std::int64_t rows = task.shape.max_positions;
  require(value != rows, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, found {}: the caches of {} positions are full", kName, rows - 1,
          value, rows);
  require(value >= 0 && value < rows, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, because the caches have {} positions, found {}", kName, rows - 1,
          rows, value);
  task.position = value;
}

struct Caches {
  void* keys;
  void* values;
  std::int64_t max_positions;
};

Caches check_caches(TensorChecker& checker, const LayerTensors& tensors, const Dimension& hidden) {
  const Dimension positions{rows_of(tensors.k_cache, "k_cache", "max_seq_len", hidden.size),
                            "max_seq_len"};
  return {checker.write(tensors.k_cache, "k_cache", {positions, hidden}),
          checker.write(tensors.v_cache, "v_cache", {positions, hidden}), positions.size};
}

Dimension intermediate_of(const DLTensor& mlp_up_weight, const Dimension& hidden,
                          const ExpectedSizes& expected) {
  if (expected.intermediate != 0) return {expected.intermediate, "intermediate"};
  return {rows_of(mlp_up_weight, "mlp_up_weight", "intermediate", hidden.size), "intermediate"};
}

void check_weights(TensorChecker& checker, const LayerTensors& t, LayerTask& task) {
  using enum LayerTensor;
  const Dimension hidden{task.shape.hidden_size, "hidden"};
  const Dimension qkv{3 * task.shape.hidden_size, "3 hidden"};
  const Dimension intermediate{task.shape.intermediate_size, "intermediate"};
  const auto check = [&](LayerTensor tensor, const DLTensor& given, const char* name, Shape shape) {
    task.weights[index_of(tensor)] = checker.read(given, name, shape);
  };
  check(qkv_weight, t.weight_qkv, "weight_qkv", {qkv, hidden});
  if (is_present(t.bias_qkv)) check(qkv_bias, t.bias_qkv, "bias_qkv", {qkv});
  check(attention_out_weight, t.weight_o, "weight_o", {hidden, hidden});
  if (is_present(t.bias_o)) check(attention_out_bias, t.bias_o, "bias_o", {hidden});
  check(input_norm_weight, t.ln_weight, "ln_weight", {hidden});
  check(input_norm_bias, t.ln_bias, "ln_bias", {hidden});
  check(post_norm_weight, t.post_ln_weight, "post_ln_weight", {hidden});
  check(post_norm_bias, t.post_ln_bias, "post_ln_bias", {hidden});
  check(mlp_up_weight, t.mlp_up_weight, "mlp_up_weight", {intermediate, hidden});
  check(mlp_up_bias, t.mlp_up_bias, "mlp_up_bias", {intermediate});
}

void check_mlp_down(TensorChecker& checker, const DLTensor& weight, const DLTensor& bias,
                    LayerTask& task) {
  const Dimension hidden{task.shape.hidden_size, "hidden"};
  const Dimension intermediate{task.shape.intermediate_size, "intermediate"};
  task.weights[index_of(LayerTensor::mlp_down_weight)] =
      checker.read(weight, "mlp_down_weight", {hidden, intermediate});
  task.weights[index_of(LayerTensor::mlp_down_bias)] =
      checker.read(bias, "mlp_down_bias", {hidden});
}

LayerTask check_inputs(TensorChecker& checker, const LayerTensors& tensors,
                       const LayerOptions& options, const ExpectedSizes& expected) {
  LayerTask task;
  task.shape.dtype = checker.dtype();
  task.shape.hidden_size = checker.hidden_size();
  const Dimension hidden{checker.hidden_size(), "hidden"};
  task.input = checker.read(tensors.input, "input", {{1, "1"}, hidden}, Leading::ones);
  check_heads(options, task.shape);
  require(std::isfinite(options.layer_norm_eps) && options.layer_norm_eps >= 0,
          ErrorKind::invalid_argument,
          "layer_norm_eps: expected a finite number of at least 0, found {}",
          options.layer_norm_eps);
  task.layer_norm_eps = static_cast<float>(options.layer_norm_eps);
  task.activation = options.activation;
  const Caches caches = check_caches(checker, tensors, hidden);
  task.k_cache = caches.keys;
  task.v_cache = caches.values;
  task.shape.max_positions = caches.max_positions;
  check_rotary(checker, tensors, options, task);
  task.shape.intermediate_size = intermediate_of(tensors.mlp_up_weight, hidden, expected).size;
  check_weights(checker, tensors, task);
  return task;
}

void check_new_key_value(TensorChecker& checker, const DLTensor& k_new, const DLTensor& v_new,
                         LayerTask& task) {
  const Shape shape{
      {1, "1"}, {task.shape.num_heads, "num_heads"}, {task.shape.head_dim, "head_dim"}};
  task.k_new = checker.write(k_new, "k_new", shape);
  task.v_new = checker.write(v_new, "v_new", shape);
}

}  // namespace

Checked check(const LayerTensors& tensors, const LayerOptions& options,
              const ExpectedSizes& expected, const AttentionMlpUpResults* results) {
  TensorChecker checker(tensors.input, "input", expected.hidden);
  LayerTask task = check_inputs(checker, tensors, options, expected);
  task.part = plan::Part::attention_and_mlp_up;
  check_position(checker, tensors.current_seq_len, task);
  if (results != nullptr) {
    const LayerShape& shape = task.shape;
    task.attn_output = checker.write(results->attn_output, "attn_output",
                                     {{1, "1"}, {shape.hidden_size, "hidden"}}, Leading::ones);
    task.mlp_intermediate =
        checker.write(results->mlp_intermediate, "mlp_intermediate",
                      {{shape.intermediate_size, "intermediate"}}, Leading::ones);
    check_new_key_value(checker, results->k_new, results->v_new, task);
  }
  checker.require_no_overlap();
  return {task, checker.device()};
}

Checked check(const MlpDownTensors& tensors, const ExpectedSizes& expected,
              const DLTensor* output) {
  TensorChecker checker(tensors.hidden_states, "hidden_states", expected.hidden);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  const Dimension intermediate{
      expected.intermediate != 0 ? expected.intermediate : last_size(tensors.mlp_intermediate),
      "intermediate"};
  LayerTask task;
  task.part = plan::Part::mlp_down;
  task.shape.dtype = checker.dtype();
  task.shape.hidden_size = hidden.size;
  task.shape.intermediate_size = intermediate.size;
  task.input =
      checker.read(tensors.hidden_states, "hidden_states", {{1, "1"}, hidden}, Leading::ones);
  // Only read; what the other half gives there, it writes.
  task.attn_output = const_cast<void*>(
      checker.read(tensors.attn_output, "attn_output", {{1, "1"}, hidden}, Leading::ones));
  task.mlp_intermediate = const_cast<void*>(
      checker.read(tensors.mlp_intermediate, "mlp_intermediate", {intermediate}, Leading::ones));
  if (intermediate.size < 1) {
    fail(ErrorKind::invalid_argument, "mlp_intermediate: expected shape [intermediate], found {}",
         shape_text(tensors.mlp_intermediate));
  }
  check_mlp_down(checker, tensors.mlp_down_weight, tensors.mlp_down_bias, task);
  if (output != nullptr) {
    task.output = checker.write(*output, "output", {{1, "1"}, hidden}, Leading::ones);
  }
  checker.require_no_overlap();
  return {task, checker.device()};
}

Checked check(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
              const DLTensor& mlp_down_bias, const LayerOptions& options,
              const ExpectedSizes& expected, const DecoderLayerResults* results) {
  TensorChecker checker(tensors.input, "input", expected.hidden);
  LayerTask task = check_inputs(checker, tensors, options, expected);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  check_mlp_down(checker, mlp_down_weight, mlp_down_bias, task);
  check_position(checker, tensors.current_seq_len, task);
  if (results != nullptr) {
    task.output = checker.write(results->output, "output", {{1, "1"}, hidden}, Leading::ones);
    check_new_key_value(checker, results->k_new, results->v_new, task);
  }
  checker.require_no_overlap();
  return {task, checker.device()};
}

void check_graph_context(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                         const ExpectedSizes& expected) {
  TensorChecker checker(tensors.k_cache, "k_cache", expected.hidden);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  check_caches(checker, tensors, hidden);
  checker.read(tensors.weight_qkv, "weight_qkv", {{3 * hidden.size, "3 hidden"}, hidden});
  checker.read(tensors.weight_o, "weight_o", {hidden, hidden});
  const Dimension intermediate = intermediate_of(tensors.mlp_up_weight, hidden, expected);
  checker.read(tensors.mlp_up_weight, "mlp_up_weight", {intermediate, hidden});
  checker.read(mlp_down_weight, "mlp_down_weight", {hidden, intermediate});
  checker.require_no_overlap();
}

}  // namespace clusterfusion::ops
