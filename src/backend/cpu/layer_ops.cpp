// The fused decoder-layer calls on the CPU: the caller's 16-bit tensors in and out, float32
// between.
#include "backend/layer_ops.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <mutex>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cpu/kernels.hpp"
#include "backend/cpu/narrow.hpp"
#include "backend/cpu/rotary.hpp"
#include "base/thread_pool.hpp"

namespace clusterfusion::cpu {
namespace {

// Weights of one task of a product.
constexpr std::int64_t kTaskBytes = 256 << 10;
// Keys and values fewer than this are not worth waking the other threads.
constexpr std::int64_t kSerialValues = 32 << 10;

// Float32 values whose padding up to a multiple of kLanes is zero, as multiply() wants them.
using Row = std::vector<float>;

Row make_row(std::int64_t count) { return Row(static_cast<std::size_t>(padded(count))); }

Row widened(DType dtype, const void* values, std::int64_t count) {
  Row row = make_row(count);
  widen(dtype, static_cast<const std::byte*>(values), count, row.data());
  return row;
}

// Runs task(i) for each i in [0, count) on a team of threads that all calls share. A call that
// finds the team busy computes alone; the results are the same.
void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task) {
  struct Team {
    ThreadPool threads{usable_cores()};
    std::mutex mutex;
  };
  // Never destroyed: in a forked process there would be no threads to wait for.
  static Team& team = *new Team;
  if (std::unique_lock lock(team.mutex, std::try_to_lock); lock && count > 1) {
    return team.threads.run(count, [&](std::int64_t i, int) { task(i); });
  }
  for (std::int64_t i = 0; i < count; ++i) task(i);
}

// out = weights in + bias, then the activation.
struct Linear {
  Matrix weights;
  Row bias;  // empty: none
  const Row& in;
  Row& out;
  Activation activation = Activation::identity;
};

Linear make_linear(DType dtype, const void* weights, const void* bias, std::int64_t rows,
                   std::int64_t cols, const Row& in, Row& out,
                   Activation activation = Activation::identity) {
  return {{static_cast<const std::byte*>(weights), dtype, rows, cols},
          bias == nullptr ? Row() : widened(dtype, bias, rows),
          in,
          out,
          activation};
}

void compute(const Linear& linear, std::int64_t row, std::int64_t row_end) {
  Product product;
  product.weights = linear.weights;
  product.in = linear.in.data();
  product.in_stride = static_cast<std::int64_t>(linear.in.size());
  product.tokens = 1;
  product.out = linear.out.data();
  product.out_stride = static_cast<std::int64_t>(linear.out.size());
  product.bias = linear.bias.empty() ? nullptr : linear.bias.data();
  multiply(product, row, row_end);
  activate(linear.activation, linear.out.data() + row, row_end - row);
}

void compute_all(std::span<const Linear> linears) {
  struct Task {
    const Linear* linear;
    std::int64_t row, row_end;
  };
  std::vector<Task> tasks;
  for (const Linear& linear : linears) {
    const Matrix& weights = linear.weights;
    const std::int64_t groups = kTaskBytes / (weights.cols * size_of(weights.dtype)) / kRowGroup;
    const std::int64_t step = std::max<std::int64_t>(groups, 1) * kRowGroup;
    for (std::int64_t row = 0; row < weights.rows; row += step) {
      tasks.push_back({&linear, row, std::min(row + step, weights.rows)});
    }
  }
  run_tasks(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t i) {
    const Task& task = tasks[static_cast<std::size_t>(i)];
    compute(*task.linear, task.row, task.row_end);
  });
}

// x cos + rotate_half(x) sin over the first rotary_dim values of a head (transformers'
// apply_rotary_pos_emb). Every value meets its own cos and sin, as the caller gave them.
void rotate_by(float* head, const float* cos, const float* sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[half + i];
    head[i] = low * cos[i] - high * sin[i];
    head[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

// The element at [row, column] of a 16-bit matrix of `columns`.
std::byte* at(void* matrix, std::int64_t row, std::int64_t columns, std::int64_t column) {
  constexpr std::int64_t kBytes = 2;
  return static_cast<std::byte*>(matrix) + (row * columns + column) * kBytes;
}

// Rounds a head's new key or value, as it will be read from the cache ever after.
void store_new(const LayerInputs& in, std::int64_t head, const float* values, void* result,
               void* cache) {
  const LayerShape& shape = in.shape;
  std::byte* row = at(cache, in.position, shape.hidden_size, head * shape.head_dim);
  narrow(shape.dtype, values, shape.head_dim, row);
  std::memcpy(at(result, head, shape.head_dim, 0), row,
              static_cast<std::size_t>(shape.head_dim * size_of(shape.dtype)));
}

// Keys and values of one head, positions 0 to in.position, in the pages that attend() reads.
class HeadPages {
 public:
  HeadPages(const LayerInputs& in, std::int64_t head)
      : layout_{DType::float32, in.shape.head_dim, padded(in.shape.head_dim)} {
    const std::int64_t positions = in.position + 1;
    const std::int64_t pages = (positions + kKvPagePositions - 1) / kKvPagePositions;
    storage_.resize(static_cast<std::size_t>(pages * layout_.elements()));
    for (std::int64_t page = 0; page < pages; ++page) {
      pages_.push_back(reinterpret_cast<std::byte*>(storage_.data() + page * layout_.elements()));
    }
    Row key = make_row(layout_.head_dim);
    Row value = make_row(layout_.head_dim);
    for (std::int64_t position = 0; position < positions; ++position) {
      read(in, in.k_cache, position, head, key);
      read(in, in.v_cache, position, head, value);
      store_key_value(layout_, key.data(), value.data(), position % kKvPagePositions,
                      pages_[static_cast<std::size_t>(position / kKvPagePositions)]);
    }
  }

  const KvLayout& layout() const noexcept { return layout_; }
  const std::byte* const* pages() const noexcept { return pages_.data(); }

 private:
  void read(const LayerInputs& in, void* cache, std::int64_t position, std::int64_t head,
            Row& row) const {
    widen(in.shape.dtype, at(cache, position, in.shape.hidden_size, head * layout_.head_dim),
          layout_.head_dim, row.data());
  }

  KvLayout layout_;
  Row storage_;
  std::vector<std::byte*> pages_;
};

// `qkv`: query, key and value of the head. Writes the head's part of caches, k_new and v_new, and
// its output.
void attend_head(const LayerInputs& in, std::int64_t head, float* qkv, float* out) {
  const std::int64_t head_dim = in.shape.head_dim;
  rotate_by(qkv, in.cos, in.sin, in.shape.rotary_dim);
  rotate_by(qkv + head_dim, in.cos, in.sin, in.shape.rotary_dim);
  store_new(in, head, qkv + head_dim, in.k_new, in.k_cache);
  store_new(in, head, qkv + 2 * head_dim, in.v_new, in.v_cache);

  const HeadPages pages(in, head);
  AttentionTask task;
  task.layout = pages.layout();
  task.pages = pages.pages();
  task.first_position = in.position;
  task.queries = 1;
  task.query = qkv;
  task.query_stride = head_dim;
  task.out = out;
  task.out_stride = head_dim;
  task.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  Row scratch(static_cast<std::size_t>(attention_scratch(head_dim)));
  attend(task, scratch.data());
}

void attend_all(const LayerInputs& in, Row& qkv, Row& out) {
  const LayerShape& shape = in.shape;
  const auto one_head = [&](std::int64_t head) {
    attend_head(in, head, qkv.data() + head * 3 * shape.head_dim,
                out.data() + head * shape.head_dim);
  };
  if ((in.position + 1) * shape.hidden_size >= kSerialValues) {
    return run_tasks(shape.num_heads, one_head);
  }
  for (std::int64_t head = 0; head < shape.num_heads; ++head) one_head(head);
}

Row normalized(const LayerInputs& in, const Row& x, const void* weight, const void* bias) {
  const std::int64_t hidden = in.shape.hidden_size;
  Row out = make_row(hidden);
  layer_norm(x.data(), widened(in.shape.dtype, weight, hidden).data(),
             widened(in.shape.dtype, bias, hidden).data(), in.layer_norm_eps, hidden, out.data());
  return out;
}

struct AttentionAndUp {
  Row attention;     // after the output projection
  Row intermediate;  // after the activation
};

AttentionAndUp attention_and_up(const LayerInputs& in, const Row& x) {
  const DType dtype = in.shape.dtype;
  const std::int64_t hidden = in.shape.hidden_size;
  const std::int64_t inner = in.shape.intermediate_size;
  const Row norm = normalized(in, x, in.ln_weight, in.ln_bias);
  const Row post_norm = normalized(in, x, in.post_ln_weight, in.post_ln_bias);
  Row qkv = make_row(3 * hidden);
  AttentionAndUp result{make_row(hidden), make_row(inner)};
  const Linear first[] = {
      make_linear(dtype, in.weight_qkv, in.bias_qkv, 3 * hidden, hidden, norm, qkv),
      make_linear(dtype, in.mlp_up_weight, in.mlp_up_bias, inner, hidden, post_norm,
                  result.intermediate, in.activation)};
  compute_all(first);
  Row heads = make_row(hidden);
  attend_all(in, qkv, heads);
  const Linear projection[] = {
      make_linear(dtype, in.weight_o, in.bias_o, hidden, hidden, heads, result.attention)};
  compute_all(projection);
  return result;
}

// output = x + attention + MLP-down of intermediate
void add_down(DType dtype, const void* weight, const void* bias, const Row& x, const Row& attention,
              const Row& intermediate, std::int64_t hidden, std::int64_t inner, void* output) {
  Row sum = make_row(hidden);
  const Linear down[] = {make_linear(dtype, weight, bias, hidden, inner, intermediate, sum)};
  compute_all(down);
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += x[i] + attention[i];
  narrow(dtype, sum.data(), hidden, output);
}

}  // namespace

void attention_mlp_up(const AttentionMlpUpTask& task) {
  const LayerShape& shape = task.inputs.shape;
  const Row x = widened(shape.dtype, task.inputs.input, shape.hidden_size);
  const AttentionAndUp result = attention_and_up(task.inputs, x);
  narrow(shape.dtype, result.attention.data(), shape.hidden_size, task.attn_output);
  narrow(shape.dtype, result.intermediate.data(), shape.intermediate_size, task.mlp_intermediate);
}

void mlp_down(const MlpDownTask& task) {
  const Row x = widened(task.dtype, task.hidden_states, task.hidden_size);
  const Row attention = widened(task.dtype, task.attn_output, task.hidden_size);
  const Row intermediate = widened(task.dtype, task.mlp_intermediate, task.intermediate_size);
  add_down(task.dtype, task.mlp_down_weight, task.mlp_down_bias, x, attention, intermediate,
           task.hidden_size, task.intermediate_size, task.output);
}

void decoder_layer(const DecoderLayerTask& task) {
  const LayerShape& shape = task.inputs.shape;
  const Row x = widened(shape.dtype, task.inputs.input, shape.hidden_size);
  const AttentionAndUp result = attention_and_up(task.inputs, x);
  add_down(shape.dtype, task.mlp_down_weight, task.mlp_down_bias, x, result.attention,
           result.intermediate, shape.hidden_size, shape.intermediate_size, task.output);
}

}  // namespace clusterfusion::cpu
