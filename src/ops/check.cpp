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

void check_heads(const LayerOptions& options, LayerSpec& spec) {
  require(options.num_heads >= 1 && spec.hidden_size % options.num_heads == 0,
          ErrorKind::invalid_argument,
          "num_heads: expected a divisor of the hidden size {}, found {}", spec.hidden_size,
          options.num_heads);
  spec.num_heads = options.num_heads;
  spec.head_dim = spec.hidden_size / options.num_heads;
  spec.num_kv_heads = options.num_kv_heads.value_or(spec.num_heads);
  require(spec.num_kv_heads >= 1 && spec.num_heads % spec.num_kv_heads == 0,
          ErrorKind::invalid_argument,
          "num_kv_heads: expected a divisor of num_heads ({}), found {}", spec.num_heads,
          spec.num_kv_heads);
  if (!options.qkv_weight_interleaved) spec.qkv_layout = QkvLayout::separate;
}

// rotary_dim values, or head_dim of which the first rotary_dim count.
void check_rotary(TensorChecker& checker, const LayerTensors& tensors, const LayerOptions& options,
                  LayerWork& work) {
  const std::int64_t head_dim = work.spec.head_dim;
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
  work.spec.rotary_dim = rotary_dim;
  const std::int64_t given = found == head_dim ? head_dim : rotary_dim;
  const char* meaning = given == head_dim ? "head_dim" : "rotary_dim";
  work.cos = checker.read_float32(tensors.cos, "cos", {{given, meaning}});
  work.sin = checker.read_float32(tensors.sin, "sin", {{given, meaning}});
}

void check_position(TensorChecker& checker, const Position& position, LayerWork& work) {
  constexpr const char* kName = "current_seq_len";
  std::int64_t value = position.value;
  if (is_present(position.tensor)) {
    const bool scalar = position.tensor.ndim == 0;
    const std::int32_t* where = scalar ? checker.read_int32(position.tensor, kName, {})
                                       : checker.read_int32(position.tensor, kName, {{1, "1"}});
    if (checker.device().device_type != kDLCPU) {
      work.positions = where;
      return;
    }
    value = *where;
  }
  const std::int64_t rows = work.cache.page_size;
  require(value != rows, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, found {}: the caches of {} positions are full", kName, rows - 1,
          value, rows);
  require(value >= 0 && value < rows, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, because the caches have {} positions, found {}", kName, rows - 1,
          rows, value);
  work.position = value;
}

// Without grouped heads these are the sizes that they have always been called by.
Dimension kv_size_of(const LayerSpec& spec) {
  const bool is_hidden = spec.kv_size() == spec.hidden_size;
  return {spec.kv_size(), is_hidden ? "hidden" : "num_kv_heads head_dim"};
}

Dimension qkv_size_of(const LayerSpec& spec) {
  const bool is_triple = spec.qkv_size() == 3 * spec.hidden_size;
  return {spec.qkv_size(), is_triple ? "3 hidden" : "(num_heads + 2 num_kv_heads) head_dim"};
}

// Of rows; gives how many.
std::int64_t check_caches(TensorChecker& checker, const LayerTensors& tensors, const Dimension& row,
                          LayerWork& work) {
  const Dimension positions{rows_of(tensors.k_cache, "k_cache", "max_seq_len", row.size),
                            "max_seq_len"};
  work.k_cache = checker.write(tensors.k_cache, "k_cache", {positions, row});
  work.v_cache = checker.write(tensors.v_cache, "v_cache", {positions, row});
  return positions.size;
}

Dimension intermediate_of(const DLTensor& mlp_up_weight, const Dimension& hidden,
                          const ExpectedSizes& expected) {
  if (expected.intermediate != 0) return {expected.intermediate, "intermediate"};
  return {rows_of(mlp_up_weight, "mlp_up_weight", "intermediate", hidden.size), "intermediate"};
}

// Rows from `row` on of a matrix or vector; null for an absent one.
const void* rows_from(const void* tensor, DType dtype, std::int64_t row, std::int64_t columns) {
  if (tensor == nullptr) return nullptr;
  return static_cast<const std::byte*>(tensor) + row * columns * size_of(dtype);
}

// Where queries, keys and values are not by head, they are three matrices, one behind the other.
void check_qkv(TensorChecker& checker, const LayerTensors& t, LayerWork& work) {
  using enum LayerTensor;
  const LayerSpec& spec = work.spec;
  const Dimension hidden{spec.hidden_size, "hidden"};
  const Dimension rows = qkv_size_of(spec);
  const void* weight = checker.read(t.weight_qkv, "weight_qkv", {rows, hidden});
  const void* bias =
      is_present(t.bias_qkv) ? checker.read(t.bias_qkv, "bias_qkv", {rows}) : nullptr;
  const auto set = [&](LayerTensor tensor, std::int64_t row) {
    work.weights[index_of(tensor)] = rows_from(weight, work.dtype, row, hidden.size);
    work.weights[index_of(bias_of(tensor))] = rows_from(bias, work.dtype, row, 1);
  };
  if (spec.qkv_layout == QkvLayout::by_kv_head) return set(qkv_weight, 0);
  set(query_weight, 0);
  set(key_weight, spec.attention_size());
  set(value_weight, spec.attention_size() + spec.kv_size());
}

void check_weights(TensorChecker& checker, const LayerTensors& t, LayerWork& work) {
  using enum LayerTensor;
  const Dimension hidden{work.spec.hidden_size, "hidden"};
  const Dimension intermediate{work.spec.intermediate_size, "intermediate"};
  const auto check = [&](LayerTensor tensor, const DLTensor& given, const char* name, Shape shape) {
    work.weights[index_of(tensor)] = checker.read(given, name, shape);
  };
  check_qkv(checker, t, work);
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
                    LayerWork& work) {
  const Dimension hidden{work.spec.hidden_size, "hidden"};
  const Dimension intermediate{work.spec.intermediate_size, "intermediate"};
  work.weights[index_of(LayerTensor::mlp_down_weight)] =
      checker.read(weight, "mlp_down_weight", {hidden, intermediate});
  work.weights[index_of(LayerTensor::mlp_down_bias)] =
      checker.read(bias, "mlp_down_bias", {hidden});
}

LayerWork check_inputs(TensorChecker& checker, const LayerTensors& tensors,
                       const LayerOptions& options, const ExpectedSizes& expected) {
  LayerWork work;
  work.dtype = checker.dtype();
  work.spec.hidden_size = checker.hidden_size();
  const Dimension hidden{checker.hidden_size(), "hidden"};
  work.input = checker.read(tensors.input, "input", {{1, "1"}, hidden}, Leading::ones);
  check_heads(options, work.spec);
  require(std::isfinite(options.layer_norm_eps) && options.layer_norm_eps >= 0,
          ErrorKind::invalid_argument,
          "layer_norm_eps: expected a finite number of at least 0, found {}",
          options.layer_norm_eps);
  work.spec.layer_norm_eps = options.layer_norm_eps;
  work.spec.activation = options.activation;
  work.spec.intermediate_size = intermediate_of(tensors.mlp_up_weight, hidden, expected).size;
  check_weights(checker, tensors, work);
  work.cache.page_size = check_caches(checker, tensors, kv_size_of(work.spec), work);
  work.cache.position_stride = work.spec.kv_size();
  work.cache.head_stride = work.spec.head_dim;
  check_rotary(checker, tensors, options, work);
  return work;
}

void check_new_key_value(TensorChecker& checker, const DLTensor& k_new, const DLTensor& v_new,
                         LayerWork& work) {
  const Shape shape{
      {1, "1"}, {work.spec.kv_heads(), "num_kv_heads"}, {work.spec.head_dim, "head_dim"}};
  work.k_new = checker.write(k_new, "k_new", shape);
  work.v_new = checker.write(v_new, "v_new", shape);
}

}  // namespace

Checked check(const LayerTensors& tensors, const LayerOptions& options,
              const ExpectedSizes& expected, const AttentionMlpUpResults* results) {
  TensorChecker checker(tensors.input, "input", expected.hidden);
  LayerWork work = check_inputs(checker, tensors, options, expected);
  work.part = plan::Part::attention_and_mlp_up;
  check_position(checker, tensors.current_seq_len, work);
  if (results != nullptr) {
    const LayerSpec& spec = work.spec;
    work.attn_output = checker.write(results->attn_output, "attn_output",
                                     {{1, "1"}, {spec.hidden_size, "hidden"}}, Leading::ones);
    work.mlp_intermediate =
        checker.write(results->mlp_intermediate, "mlp_intermediate",
                      {{spec.intermediate_size, "intermediate"}}, Leading::ones);
    check_new_key_value(checker, results->k_new, results->v_new, work);
  }
  checker.require_no_overlap();
  return {work, checker.device()};
}

Checked check(const MlpDownTensors& tensors, const ExpectedSizes& expected,
              const DLTensor* output) {
  TensorChecker checker(tensors.hidden_states, "hidden_states", expected.hidden);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  const Dimension intermediate{
      expected.intermediate != 0 ? expected.intermediate : last_size(tensors.mlp_intermediate),
      "intermediate"};
  LayerWork work;
  work.part = plan::Part::mlp_down;
  work.dtype = checker.dtype();
  work.spec.hidden_size = hidden.size;
  work.spec.intermediate_size = intermediate.size;
  work.input =
      checker.read(tensors.hidden_states, "hidden_states", {{1, "1"}, hidden}, Leading::ones);
  // Only read; what the other half gives there, it writes.
  work.attn_output = const_cast<void*>(
      checker.read(tensors.attn_output, "attn_output", {{1, "1"}, hidden}, Leading::ones));
  work.mlp_intermediate = const_cast<void*>(
      checker.read(tensors.mlp_intermediate, "mlp_intermediate", {intermediate}, Leading::ones));
  if (intermediate.size < 1) {
    fail(ErrorKind::invalid_argument, "mlp_intermediate: expected shape [intermediate], found {}",
         shape_text(tensors.mlp_intermediate));
  }
  check_mlp_down(checker, tensors.mlp_down_weight, tensors.mlp_down_bias, work);
  if (output != nullptr) {
    work.output = checker.write(*output, "output", {{1, "1"}, hidden}, Leading::ones);
  }
  checker.require_no_overlap();
  return {work, checker.device()};
}

Checked check(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
              const DLTensor& mlp_down_bias, const LayerOptions& options,
              const ExpectedSizes& expected, const DecoderLayerResults* results) {
  TensorChecker checker(tensors.input, "input", expected.hidden);
  LayerWork work = check_inputs(checker, tensors, options, expected);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  check_mlp_down(checker, mlp_down_weight, mlp_down_bias, work);
  check_position(checker, tensors.current_seq_len, work);
  if (results != nullptr) {
    work.output = checker.write(results->output, "output", {{1, "1"}, hidden}, Leading::ones);
    check_new_key_value(checker, results->k_new, results->v_new, work);
  }
  checker.require_no_overlap();
  return {work, checker.device()};
}

void check_graph_context(const LayerTensors& tensors, const DLTensor& mlp_down_weight,
                         const ExpectedSizes& expected) {
  TensorChecker checker(tensors.k_cache, "k_cache", expected.hidden);
  const Dimension hidden{checker.hidden_size(), "hidden"};
  LayerWork unused;
  check_caches(checker, tensors, hidden, unused);
  checker.read(tensors.weight_qkv, "weight_qkv", {{3 * hidden.size, "3 hidden"}, hidden});
  checker.read(tensors.weight_o, "weight_o", {hidden, hidden});
  const Dimension intermediate = intermediate_of(tensors.mlp_up_weight, hidden, expected);
  checker.read(tensors.mlp_up_weight, "mlp_up_weight", {intermediate, hidden});
  checker.read(mlp_down_weight, "mlp_down_weight", {hidden, intermediate});
  checker.require_no_overlap();
}

}  // namespace clusterfusion::ops
