#include "ops/check.hpp"

#include <cmath>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "ops/strided.hpp"
#include "ops/tensor_checker.hpp"

namespace clusterfusion::ops {
namespace {

// Rows of a matrix that may have any number of them. An absent one has none: the checker says so.
std::int64_t rows_of(const DLTensor& tensor, const char* name, const char* meaning,
                     std::int64_t columns) {
  if (!is_given(tensor)) return 0;
  if (tensor.ndim != 2 || tensor.shape[0] < 1) {
    fail(ErrorKind::invalid_argument, "{}: expected shape [{}, {}], found {}", name, meaning,
         columns, shape_text(tensor));
  }
  return tensor.shape[0];
}

std::int64_t last_size(const DLTensor& tensor) {
  return tensor.ndim >= 1 ? tensor.shape[tensor.ndim - 1] : 0;
}

bool is_paged(const LayerTensors& tensors) { return is_given(tensors.block_table); }

// How many rows a tensor has, of which there may be several. What they are is yet to be checked.
Dimension count_rows(const DLTensor& tensor, const char* name) {
  for (int axis = 0; axis < tensor.ndim - 2; ++axis) {
    require(tensor.shape[axis] == 1, ErrorKind::invalid_argument,
            "{}: expected shape [rows, {}], or [1, rows, {}], found {}", name, last_size(tensor),
            last_size(tensor), shape_text(tensor));
  }
  const std::int64_t rows = tensor.ndim >= 2 ? tensor.shape[tensor.ndim - 2] : 1;
  if (rows < 1 || rows > kMaxLayerRows) {
    fail(ErrorKind::invalid_argument, "{}: expected 1 to {} rows, found shape {}", name,
         kMaxLayerRows, shape_text(tensor));
  }
  return {rows, rows == 1 ? "1" : "rows"};
}

// The rows of a layer's input.
Dimension check_input(TensorChecker& checker, const LayerTensors& tensors, LayerWork& work) {
  const DLTensor& input = tensors.input;
  const Dimension hidden{checker.hidden_size(), "hidden"};
  Dimension rows{1, "1"};
  if (is_paged(tensors)) {
    rows = count_rows(input, "input");
  } else if (input.ndim == 2 && input.shape[0] > 1 && input.shape[1] == hidden.size) {
    fail(ErrorKind::invalid_argument,
         "input: expected shape [1, {}] (1, hidden), because several rows need a block_table, "
         "found {}",
         hidden.size, shape_text(input));
  }
  work.rows = rows.size;
  work.input = checker.read(input, "input", {rows, hidden}, Leading::ones);
  return rows;
}

void check_heads(const LayerOptions& options, LayerSpec& spec) {
  constexpr std::int64_t kMost = 65536;  // so that no size overflows
  const std::int64_t heads = options.num_heads;
  if (options.head_dim) {
    require(heads >= 1 && heads <= kMost, ErrorKind::invalid_argument,
            "num_heads: expected 1 to {}, found {}", kMost, heads);
    require(*options.head_dim >= 1 && *options.head_dim <= kMost, ErrorKind::invalid_argument,
            "head_dim: expected 1 to {}, found {}", kMost, *options.head_dim);
  } else {
    require(heads >= 1 && spec.hidden_size % heads == 0, ErrorKind::invalid_argument,
            "num_heads: expected a divisor of the hidden size {}, found {}", spec.hidden_size,
            heads);
  }
  spec.num_heads = heads;
  spec.head_dim = options.head_dim ? *options.head_dim : spec.hidden_size / heads;
  spec.num_kv_heads = options.num_kv_heads.value_or(heads);
  require(spec.num_kv_heads >= 1 && heads % spec.num_kv_heads == 0, ErrorKind::invalid_argument,
          "num_kv_heads: expected a divisor of num_heads ({}), found {}", heads, spec.num_kv_heads);
}

// The options that need no tensors.
void check_options(const LayerOptions& options, LayerSpec& spec) {
  check_heads(options, spec);
  require(std::isfinite(options.layer_norm_eps) && options.layer_norm_eps >= 0,
          ErrorKind::invalid_argument,
          "layer_norm_eps: expected a finite number of at least 0, found {}",
          options.layer_norm_eps);
  spec.layer_norm_eps = options.layer_norm_eps;
  spec.activation = options.activation;
  spec.norm = options.norm;
  spec.gated_mlp = options.gated;
  spec.parallel_residual = options.parallel_residual;
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
  work.rotary_stride = given;
  const Dimension values{given, given == head_dim ? "head_dim" : "rotary_dim"};
  const auto read = [&](const DLTensor& tensor, const char* name) {
    if (work.rows == 1) return checker.read_float32(tensor, name, {values});
    return checker.read_float32(tensor, name, {{work.rows, "rows"}, values});
  };
  work.cos = read(tensors.cos, "cos");
  work.sin = read(tensors.sin, "sin");
}

void require_position(const LayerWork& work, std::int64_t value, const char* name) {
  const std::int64_t most = work.max_pages * work.cache.page_size;
  if (work.block_table != nullptr) {
    return require(value >= 0 && value < most, ErrorKind::invalid_argument,
                   "{}: expected 0 to {}, because block_table has {} pages of {} positions for "
                   "each row, found {}",
                   name, most - 1, work.max_pages, work.cache.page_size, value);
  }
  require(value != most, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, found {}: the caches of {} positions are full", name, most - 1,
          value, most);
  require(value >= 0 && value < most, ErrorKind::invalid_argument,
          "{}: expected 0 to {}, because the caches have {} positions, found {}", name, most - 1,
          most, value);
}

// A tensor's positions are left to those who do the work, but for the one that this looks at.
void check_position(TensorChecker& checker, const Position& position, LayerWork& work) {
  std::int64_t value = position.value;
  if (is_given(position.tensor)) {
    const DLTensor& tensor = position.tensor;
    const Dimension rows{work.rows, work.rows == 1 ? "1" : "rows"};
    const bool is_scalar = tensor.ndim == 0 && work.rows == 1;
    const std::int32_t* where = is_scalar ? checker.read_int32(tensor, position.name, {})
                                          : checker.read_int32(tensor, position.name, {rows});
    if (checker.device().device_type != kDLCPU || work.block_table != nullptr) {
      work.positions = where;
      return;
    }
    value = *where;
  }
  require_position(work, value, position.name);
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

// Pages without their table are a likely slip.
void require_rows(const DLTensor& k_cache, std::int64_t row_size) {
  if (k_cache.ndim != 4) return;
  fail(ErrorKind::invalid_argument,
       "k_cache: expected shape [max_seq_len, {}], because caches in pages need a block_table, "
       "found {}",
       row_size, shape_text(k_cache));
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

void require_same_strides(const DLTensor& k_cache, const DLTensor& v_cache) {
  for (int axis = 0; axis < k_cache.ndim; ++axis) {
    const std::int64_t expected = stride_of(k_cache, axis), found = stride_of(v_cache, axis);
    require(k_cache.shape[axis] == 1 || found == expected, ErrorKind::invalid_argument,
            "v_cache: expected the strides of k_cache, which are {} along dimension {}, found {}",
            expected, axis, found);
  }
}

// Of pages, and the table of them.
void check_pages(TensorChecker& checker, const LayerTensors& tensors, LayerWork& work) {
  const LayerSpec& spec = work.spec;
  const DLTensor& keys = tensors.k_cache;
  CacheLayout& cache = work.cache;
  if (is_given(keys)) {  // or the checker says what is missing
    if (keys.ndim != 4 || keys.shape[0] < 1) {
      fail(ErrorKind::invalid_argument,
           "k_cache: expected shape [pages, page_size, {}, {}] (pages, page_size, num_kv_heads, "
           "head_dim) with a block_table, found {}",
           spec.kv_heads(), spec.head_dim, shape_text(keys));
    }
    cache.pages = keys.shape[0];
    cache.page_size = keys.shape[1];
    require(cache.page_size == 16 || cache.page_size == 32 || cache.page_size == 64,
            ErrorKind::invalid_argument,
            "k_cache: expected pages of 16, 32 or 64 positions, found shape {}", shape_text(keys));
  }
  const Shape shape{{cache.pages, "pages"},
                    {cache.page_size, "page_size"},
                    {spec.kv_heads(), "num_kv_heads"},
                    {spec.head_dim, "head_dim"}};
  work.k_cache = checker.write_nested(keys, "k_cache", shape);
  work.v_cache = checker.write_nested(tensors.v_cache, "v_cache", shape);
  require_same_strides(keys, tensors.v_cache);
  cache.page_stride = stride_of(keys, 0);
  cache.position_stride = stride_of(keys, 1);
  cache.head_stride = stride_of(keys, 2);

  const DLTensor& table = tensors.block_table;
  if (table.ndim != 2 || table.shape[1] < 1) {
    fail(ErrorKind::invalid_argument, "block_table: expected shape [{}, max_pages], found {}",
         work.rows, shape_text(table));
  }
  work.max_pages = table.shape[1];
  work.block_table = checker.read_int32_rows(table, "block_table",
                                             {{work.rows, "rows"}, {work.max_pages, "max_pages"}});
  work.block_table_stride = stride_of(table, 0);
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
  const void* bias = is_given(t.bias_qkv) ? checker.read(t.bias_qkv, "bias_qkv", {rows}) : nullptr;
  const auto set = [&](LayerTensor tensor, std::int64_t row) {
    work.weights[index_of(tensor)] = rows_from(weight, work.dtype, row, hidden.size);
    work.weights[index_of(bias_of(tensor))] = rows_from(bias, work.dtype, row, 1);
  };
  if (spec.qkv_layout == QkvLayout::by_kv_head) return set(qkv_weight, 0);
  set(query_weight, 0);
  set(key_weight, spec.attention_size());
  set(value_weight, spec.attention_size() + spec.kv_size());
}

void check_norm(TensorChecker& checker, const DLTensor& weight, const char* weight_name,
                const DLTensor& bias, const char* bias_name, LayerTensor tensor, LayerWork& work) {
  const Dimension hidden{work.spec.hidden_size, "hidden"};
  work.weights[index_of(tensor)] = checker.read(weight, weight_name, {hidden});
  if (work.spec.norm == NormKind::layer_norm) {
    work.weights[index_of(bias_of(tensor))] = checker.read(bias, bias_name, {hidden});
    return;
  }
  require(!is_given(bias), ErrorKind::invalid_argument,
          "{}: expected None, because an RMSNorm has no bias, found a tensor", bias_name);
}

// A gated one has the gate's rows first.
void check_mlp_up(TensorChecker& checker, const LayerTensors& t, LayerWork& work) {
  const LayerSpec& spec = work.spec;
  const Dimension hidden{spec.hidden_size, "hidden"};
  const Dimension rows = spec.gated_mlp ? Dimension{2 * spec.intermediate_size, "2 intermediate"}
                                        : Dimension{spec.intermediate_size, "intermediate"};
  const void* weight = checker.read(t.mlp_up_weight, "mlp_up_weight", {rows, hidden});
  const void* bias =
      is_given(t.mlp_up_bias) ? checker.read(t.mlp_up_bias, "mlp_up_bias", {rows}) : nullptr;
  const auto set = [&](LayerTensor tensor, std::int64_t row) {
    work.weights[index_of(tensor)] = rows_from(weight, work.dtype, row, hidden.size);
    work.weights[index_of(bias_of(tensor))] = rows_from(bias, work.dtype, row, 1);
  };
  if (spec.gated_mlp) set(LayerTensor::mlp_gate_weight, 0);
  set(LayerTensor::mlp_up_weight, spec.gated_mlp ? spec.intermediate_size : 0);
}

void check_head_norms(TensorChecker& checker, const LayerTensors& t, LayerWork& work) {
  work.spec.qk_norm = is_given(t.q_norm_weight) || is_given(t.k_norm_weight);
  if (!work.spec.qk_norm) return;
  const Dimension head_dim{work.spec.head_dim, "head_dim"};
  work.weights[index_of(LayerTensor::query_norm_weight)] =
      checker.read(t.q_norm_weight, "q_norm_weight", {head_dim});
  work.weights[index_of(LayerTensor::key_norm_weight)] =
      checker.read(t.k_norm_weight, "k_norm_weight", {head_dim});
}

void check_weights(TensorChecker& checker, const LayerTensors& t, LayerWork& work) {
  using enum LayerTensor;
  const LayerSpec& spec = work.spec;
  const Dimension hidden{spec.hidden_size, "hidden"};
  const bool is_square = spec.attention_size() == spec.hidden_size;
  const Dimension heads{spec.attention_size(), is_square ? "hidden" : "num_heads head_dim"};
  check_qkv(checker, t, work);
  work.weights[index_of(attention_out_weight)] =
      checker.read(t.weight_o, "weight_o", {hidden, heads});
  if (is_given(t.bias_o)) {
    work.weights[index_of(attention_out_bias)] = checker.read(t.bias_o, "bias_o", {hidden});
  }
  check_norm(checker, t.ln_weight, "ln_weight", t.ln_bias, "ln_bias", input_norm_weight, work);
  check_norm(checker, t.post_ln_weight, "post_ln_weight", t.post_ln_bias, "post_ln_bias",
             post_norm_weight, work);
  check_mlp_up(checker, t, work);
  check_head_norms(checker, t, work);
}

void check_mlp_down(TensorChecker& checker, const DLTensor& weight, const DLTensor& bias,
                    LayerWork& work) {
  const Dimension hidden{work.spec.hidden_size, "hidden"};
  const Dimension intermediate{work.spec.intermediate_size, "intermediate"};
  work.weights[index_of(LayerTensor::mlp_down_weight)] =
      checker.read(weight, "mlp_down_weight", {hidden, intermediate});
  if (!is_given(bias)) return;
  work.weights[index_of(LayerTensor::mlp_down_bias)] =
      checker.read(bias, "mlp_down_bias", {hidden});
}

LayerWork check_inputs(TensorChecker& checker, const LayerTensors& tensors,
                       const LayerOptions& options, const ExpectedSizes& expected) {
  LayerWork work;
  work.dtype = checker.dtype();
  work.spec.hidden_size = checker.hidden_size();
  const Dimension hidden{checker.hidden_size(), "hidden"};
  check_input(checker, tensors, work);
  check_options(options, work.spec);
  const Dimension up = intermediate_of(tensors.mlp_up_weight, hidden, expected);
  work.spec.intermediate_size = options.gated ? up.size / 2 : up.size;
  if (options.gated && up.size % 2 != 0) {
    fail(ErrorKind::invalid_argument,
         "mlp_up_weight: expected an even number of rows, those of the gate and as many others, "
         "because gated is True, found shape {}",
         shape_text(tensors.mlp_up_weight));
  }
  check_weights(checker, tensors, work);
  if (is_paged(tensors)) {
    check_pages(checker, tensors, work);
  } else {
    require_rows(tensors.k_cache, work.spec.kv_size());
    work.cache.page_size = check_caches(checker, tensors, kv_size_of(work.spec), work);
    work.cache.position_stride = work.spec.kv_size();
    work.cache.head_stride = work.spec.head_dim;
  }
  check_rotary(checker, tensors, options, work);
  return work;
}

Dimension rows_of_results(const LayerWork& work) {
  return {work.rows, work.rows == 1 ? "1" : "rows"};
}

void check_new_key_value(TensorChecker& checker, const DLTensor& k_new, const DLTensor& v_new,
                         LayerWork& work) {
  const Shape shape{rows_of_results(work),
                    {work.spec.kv_heads(), "num_kv_heads"},
                    {work.spec.head_dim, "head_dim"}};
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
    work.attn_output =
        checker.write(results->attn_output, "attn_output",
                      {rows_of_results(work), {spec.hidden_size, "hidden"}}, Leading::ones);
    const Dimension intermediate{spec.intermediate_size, "intermediate"};
    work.mlp_intermediate =
        work.rows == 1 ? checker.write(results->mlp_intermediate, "mlp_intermediate",
                                       {intermediate}, Leading::ones)
                       : checker.write(results->mlp_intermediate, "mlp_intermediate",
                                       {rows_of_results(work), intermediate}, Leading::ones);
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
  const Dimension rows = count_rows(tensors.hidden_states, "hidden_states");
  work.rows = rows.size;
  work.input = checker.read(tensors.hidden_states, "hidden_states", {rows, hidden}, Leading::ones);
  // Only read; what the other half gives there, it writes.
  work.attn_output = const_cast<void*>(
      checker.read(tensors.attn_output, "attn_output", {rows, hidden}, Leading::ones));
  const DLTensor& up = tensors.mlp_intermediate;
  work.mlp_intermediate = const_cast<void*>(
      rows.size == 1 ? checker.read(up, "mlp_intermediate", {intermediate}, Leading::ones)
                     : checker.read(up, "mlp_intermediate", {rows, intermediate}, Leading::ones));
  if (intermediate.size < 1) {
    fail(ErrorKind::invalid_argument, "mlp_intermediate: expected shape [intermediate], found {}",
         shape_text(tensors.mlp_intermediate));
  }
  check_mlp_down(checker, tensors.mlp_down_weight, tensors.mlp_down_bias, work);
  if (output != nullptr) {
    work.output = checker.write(*output, "output", {rows, hidden}, Leading::ones);
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
    work.output =
        checker.write(results->output, "output", {rows_of_results(work), hidden}, Leading::ones);
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
