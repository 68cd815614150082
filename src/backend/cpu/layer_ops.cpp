// The fused decoder-layer calls on the CPU: the caller's 16-bit tensors in and out, float32
// between.
#include "backend/layer_ops.hpp"

#include <algorithm>
#include <array>
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
constexpr std::int64_t kSerialLayerValues = 32 << 10;

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
void store_new(const LayerTask& in, std::int64_t head, const float* values, void* result,
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
  HeadPages(const LayerTask& in, std::int64_t head)
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
  void read(const LayerTask& in, void* cache, std::int64_t position, std::int64_t head,
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
void attend_head(const LayerTask& in, std::int64_t head, float* qkv, float* out) {
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

void attend_all(const LayerTask& in, Row& qkv, Row& out) {
  const LayerShape& shape = in.shape;
  const auto one_head = [&](std::int64_t head) {
    attend_head(in, head, qkv.data() + head * 3 * shape.head_dim,
                out.data() + head * shape.head_dim);
  };
  if ((in.position + 1) * shape.hidden_size >= kSerialLayerValues) {
    return run_tasks(shape.num_heads, one_head);
  }
  for (std::int64_t head = 0; head < shape.num_heads; ++head) one_head(head);
}

// Runs a part of the layer's program. What its steps add to the residual stream stays apart,
// because the calls hand it on.
class LayerRun {
 public:
  explicit LayerRun(const LayerTask& task) : task_(task) {
    spec_.hidden_size = task.shape.hidden_size;
    spec_.num_heads = task.shape.num_heads;
    spec_.head_dim = task.shape.head_dim;
    spec_.intermediate_size = task.shape.intermediate_size;
    at(plan::Place::residual) = widened(task.shape.dtype, task.input, spec_.hidden_size);
  }

  Row& at(plan::Place place) { return rows_[static_cast<std::size_t>(place)]; }
  Row attention, mlp;  // what each half adds

  void run(plan::Part part) {
    const plan::LayerProgram program = plan::make_layer_program(spec_, part);
    for (const std::span<const plan::Step> phase : plan::phases_of(program)) {
      switch (phase[0].operation) {
        case plan::Operation::norm:
          for (const plan::Step& step : phase) normalize(step);
          break;
        case plan::Operation::product: multiply_all(phase); break;
        case plan::Operation::attention:
          at(plan::Place::heads) = make_row(spec_.hidden_size);
          attend_all(task_, at(plan::Place::qkv), at(plan::Place::heads));
      }
    }
  }

 private:
  // Empty if absent.
  Row vector(LayerTensor tensor, std::int64_t count) const {
    const void* values = task_.weight(tensor);
    return values == nullptr ? Row() : widened(task_.shape.dtype, values, count);
  }

  void normalize(const plan::Step& step) {
    const std::int64_t hidden = spec_.hidden_size;
    Row& out = at(step.output) = make_row(hidden);
    layer_norm(at(step.input).data(), vector(step.weight, hidden).data(),
               vector(bias_of(step.weight), hidden).data(), task_.layer_norm_eps, hidden,
               out.data());
  }

  void multiply_all(std::span<const plan::Step> phase) {
    std::vector<Linear> linears;
    for (const plan::Step& step : phase) {
      const bool adds = step.epilogue == plan::Epilogue::add_to_output;
      Row& out = !adds ? at(step.output) : step.of_mlp ? mlp : attention;
      const std::int64_t rows = plan::width_of(step.output, spec_);
      out = make_row(rows);
      const bool activates = step.epilogue == plan::Epilogue::activate;
      linears.push_back({{static_cast<const std::byte*>(task_.weight(step.weight)),
                          task_.shape.dtype, rows, plan::width_of(step.input, spec_)},
                         vector(bias_of(step.weight), rows),
                         at(step.input),
                         out,
                         activates ? task_.activation : Activation::identity});
    }
    compute_all(linears);
  }

  const LayerTask& task_;
  LayerSpec spec_;
  std::array<Row, plan::kNumPlaces> rows_;
};

}  // namespace

void run_layer(const LayerTask& task) {
  const LayerShape& shape = task.shape;
  LayerRun layer(task);
  Row& intermediate = layer.at(plan::Place::mlp);
  if (task.part == plan::Part::mlp_down) {
    layer.attention = widened(shape.dtype, task.attn_output, shape.hidden_size);
    intermediate = widened(shape.dtype, task.mlp_intermediate, shape.intermediate_size);
  }
  layer.run(task.part);
  if (task.part == plan::Part::attention_and_mlp_up) {
    narrow(shape.dtype, layer.attention.data(), shape.hidden_size, task.attn_output);
    narrow(shape.dtype, intermediate.data(), shape.intermediate_size, task.mlp_intermediate);
    return;
  }
  Row& sum = layer.mlp;
  const Row& x = layer.at(plan::Place::residual);
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += x[i] + layer.attention[i];
  narrow(shape.dtype, sum.data(), shape.hidden_size, task.output);
}

}  // namespace clusterfusion::cpu
