#include "backend/cpu/transformer.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <new>

#include "backend/backend.hpp"
#include "base/fail.hpp"
#include "base/tensor_view.hpp"

namespace clusterfusion::cpu {
namespace {

// Activations of one run() take at most this much.
constexpr std::int64_t kActivationBytes = std::int64_t{64} << 20;
constexpr std::int64_t kMaxRows = 512;
// Up to so many tokens share long stretches of weights; their smallest task.
constexpr std::int64_t kFewTokens = 128;
constexpr std::int64_t kMinTaskBytes = 128 << 10;
// Their largest: some ten milliseconds, after which a request to stop is looked at.
constexpr std::int64_t kMaxTaskBytes = 16 << 20;
// Shape of a task of more tokens.
constexpr std::int64_t kTaskTokens = 128;
constexpr std::int64_t kTaskRows = 4 * kRowGroup;
// Queries of a task of attention, and the longest piece of a sequence whose keys are stored and
// attended to in one task for each head.
constexpr std::int64_t kTaskQueries = 64;
constexpr std::int64_t kShortSegment = 16;
// Fewer values than this are not worth waking the other threads.
constexpr std::int64_t kSerialValues = 16 << 10;

Matrix matrix_of(const DLTensor& tensor) {
  return {data_of(tensor), *dtype_of(tensor), tensor.shape[0], tensor.shape[1]};
}

// A vector in float32; empty if absent.
std::vector<float> vector_of(const DLTensor& tensor) {
  if (!is_present(tensor)) return {};
  std::vector<float> values(static_cast<std::size_t>(num_elements(tensor)));
  widen(*dtype_of(tensor), data_of(tensor), num_elements(tensor), values.data());
  return values;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Transformer::Transformer(const Model& model, const KvPool& pool, ThreadPool& threads)
    : config_(model.config()),
      pool_(pool),
      threads_(threads),
      rotary_(model.config().rotary_dim, model.config().rope_theta),
      embedding_(matrix_of(model.weights().embedding)),
      lm_head_(matrix_of(model.weights().lm_head)),
      final_norm_{vector_of(model.weights().final_norm_weight),
                  vector_of(model.weights().final_norm_bias)} {
  for (const LayerWeights& w : model.weights().layers) {
    layers_.push_back({{vector_of(w.input_norm_weight), vector_of(w.input_norm_bias)},
                       {vector_of(w.post_norm_weight), vector_of(w.post_norm_bias)},
                       matrix_of(w.qkv_weight),
                       matrix_of(w.attention_out_weight),
                       matrix_of(w.mlp_up_weight),
                       matrix_of(w.mlp_down_weight),
                       vector_of(w.qkv_bias),
                       vector_of(w.attention_out_bias),
                       vector_of(w.mlp_up_bias),
                       vector_of(w.mlp_down_bias)});
  }
  // Strides a little beyond the width: rows that lie a power of two apart share cache sets.
  const auto stride = [](std::int64_t width) { return padded(width) + kLanes; };
  hidden_.stride = stride(config_.hidden_size);
  norm_a_.stride = norm_b_.stride = attention_.stride = hidden_.stride;
  qkv_.stride = stride(3 * config_.hidden_size);
  mlp_.stride = stride(config_.intermediate_size);
  cos_sin_.stride = config_.rotary_dim;
  const std::int64_t row_bytes =
      4 * (4 * hidden_.stride + qkv_.stride + mlp_.stride + cos_sin_.stride);
  max_rows_ = std::clamp<std::int64_t>(kActivationBytes / row_bytes / kTaskQueries * kTaskQueries,
                                       kTaskQueries, kMaxRows);
  attention_scratch_.assign(
      static_cast<std::size_t>(threads.size()),
      std::vector<float>(static_cast<std::size_t>(attention_scratch(config_.head_dim))));
}

std::int64_t Transformer::Job::rows() const noexcept { return products[0].weights.rows; }

std::int64_t Transformer::Job::row_bytes() const noexcept {
  std::int64_t bytes = 0;
  for (const Product& p : products) bytes += p.weights.cols * size_of(p.weights.dtype);
  return bytes;
}

void Transformer::reserve(std::int64_t rows) {
  for (Activations* a : {&hidden_, &norm_a_, &norm_b_, &qkv_, &attention_, &mlp_, &cos_sin_}) {
    if (a->rows >= rows) continue;
    const auto count = static_cast<std::size_t>(std::max<std::int64_t>(rows * a->stride, 1));
    a->rows = 0;
    a->data = hwy::AllocateAligned<float>(count);
    require(a->data != nullptr, ErrorKind::out_of_memory,
            "activations of {} tokens need {} bytes, which the machine does not have", rows,
            count * sizeof(float));
    std::fill_n(a->data.get(), count, 0.0f);
    a->rows = rows;
  }
}

void Transformer::embed(std::span<const Segment> segments) {
  positions_.clear();
  std::int64_t row = 0;
  for (const Segment& segment : segments) {
    std::int64_t position = segment.first_position;
    for (const TokenId token : segment.tokens) {
      const std::byte* from = embedding_.data + token * embedding_.cols * size_of(embedding_.dtype);
      widen(embedding_.dtype, from, embedding_.cols, hidden_.row(row++));
      positions_.push_back(position++);
    }
  }
  rotary_.fill(positions_, cos_sin_.data.get());
}

void Transformer::normalize(const Norm& norm, Activations& out) {
  const auto one_row = [&](std::int64_t row, int) {
    layer_norm(hidden_.row(row), norm.weight.data(), norm.bias.data(),
               static_cast<float>(config_.layer_norm_eps), config_.hidden_size, out.row(row));
  };
  if (rows_ * config_.hidden_size >= kSerialValues) return threads_.run(rows_, one_row);
  for (std::int64_t row = 0; row < rows_; ++row) one_row(row, 0);
}

Product Transformer::product(const Matrix& weights, const std::vector<float>& bias,
                             const Activations& in, const Activations& out, bool add) const {
  return {weights,
          in.data.get(),
          in.stride,
          rows_,
          out.data.get(),
          out.stride,
          bias.empty() ? nullptr : bias.data(),
          add};
}

// Few tokens: reading the weights counts. Each task reads a long stretch, half of
// an even share of what is left, so that streams are long and yet all threads end together.
std::vector<Transformer::Task> Transformer::streaming_tasks(std::span<const Job> jobs) const {
  const std::int64_t tokens = jobs[0].products[0].tokens;
  std::int64_t left = 0;
  for (const Job& job : jobs) left += job.row_bytes() * job.rows();
  std::vector<Task> tasks;
  for (const Job& job : jobs) {
    for (std::int64_t row = 0; row < job.rows();) {
      const std::int64_t bytes = std::clamp(left / threads_.size(), kMinTaskBytes, kMaxTaskBytes);
      const std::int64_t groups = std::max<std::int64_t>(bytes / job.row_bytes() / kRowGroup, 1);
      const std::int64_t end = std::min(row + groups * kRowGroup, job.rows());
      tasks.push_back({&job, row, end, 0, tokens});
      left -= (end - row) * job.row_bytes();
      row = end;
    }
  }
  return tasks;
}

// Many tokens: weights and activations of a task fit the caches.
std::vector<Transformer::Task> Transformer::tiled_tasks(std::span<const Job> jobs) const {
  const std::int64_t tokens = jobs[0].products[0].tokens;
  std::vector<Task> tasks;
  for (const Job& job : jobs) {
    for (std::int64_t row = 0; row < job.rows(); row += kTaskRows) {
      for (std::int64_t token = 0; token < tokens; token += kTaskTokens) {
        tasks.push_back({&job, row, std::min(row + kTaskRows, job.rows()), token,
                         std::min(token + kTaskTokens, tokens)});
      }
    }
  }
  return tasks;
}

void Transformer::multiply_all(std::span<const Job> jobs) {
  const bool few = jobs[0].products[0].tokens <= kFewTokens;
  const std::vector<Task> tasks = few ? streaming_tasks(jobs) : tiled_tasks(jobs);
  threads_.run(static_cast<std::int64_t>(tasks.size()), [&](std::int64_t index, int) {
    const Task& task = tasks[static_cast<std::size_t>(index)];
    for (Product p : task.job->products) {
      p.in += task.token * p.in_stride;
      p.out += task.token * p.out_stride;
      p.tokens = task.token_end - task.token;
      multiply(p, task.row, task.row_end);
      if (!task.job->activate) continue;
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        activate(config_.activation, p.out + t * p.out_stride + task.row, task.row_end - task.row);
      }
    }
  });
}

void Transformer::store_head(const Segment& segment, std::int64_t row, std::int64_t count,
                             std::int64_t layer, std::int64_t head) {
  const std::int64_t head_dim = config_.head_dim;
  for (std::int64_t r = row; r < row + count; ++r) {
    float* query = qkv_.row(r) + head * 3 * head_dim;
    float* key = query + head_dim;
    rotate(query, cos_sin_.row(r), config_.rotary_dim);
    rotate(key, cos_sin_.row(r), config_.rotary_dim);
    const std::int64_t position = positions_[static_cast<std::size_t>(r)];
    std::byte* page = segment.pages[static_cast<std::size_t>(position / kKvPagePositions)];
    store_key_value(pool_.layout(), key, key + head_dim, position % kKvPagePositions,
                    page + pool_.offset(layer, head));
  }
}

void Transformer::attend_head(const Segment& segment, std::int64_t row, std::int64_t begin,
                              std::int64_t end, std::int64_t layer, std::int64_t head, int thread) {
  AttentionTask task;
  task.layout = pool_.layout();
  task.pages = segment.pages.data();
  task.page_offset = pool_.offset(layer, head);
  task.first_position = segment.first_position + begin;
  task.queries = end - begin;
  task.query = qkv_.row(row + begin) + head * 3 * config_.head_dim;
  task.query_stride = qkv_.stride;
  task.out = attention_.row(row + begin) + head * config_.head_dim;
  task.out_stride = attention_.stride;
  task.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.head_dim)));
  attend(task, attention_scratch_[static_cast<std::size_t>(thread)].data());
}

void Transformer::attention(std::span<const Segment> segments, std::int64_t layer) {
  const std::int64_t heads = config_.num_heads;
  const auto is_long = [](const Segment& s) {
    return static_cast<std::int64_t>(s.tokens.size()) > kShortSegment;
  };
  if (std::none_of(segments.begin(), segments.end(), is_long)) {
    std::vector<std::int64_t> first_row;
    std::int64_t row = 0;
    for (const Segment& s : segments) {
      first_row.push_back(row);
      row += static_cast<std::int64_t>(s.tokens.size());
    }
    threads_.run(static_cast<std::int64_t>(segments.size()) * heads,
                 [&](std::int64_t task, int thread) {
                   const auto index = static_cast<std::size_t>(task / heads);
                   const Segment& s = segments[index];
                   const auto count = static_cast<std::int64_t>(s.tokens.size());
                   store_head(s, first_row[index], count, layer, task % heads);
                   attend_head(s, first_row[index], 0, count, layer, task % heads, thread);
                 });
    return;
  }
  std::int64_t row = 0;
  for (const Segment& s : segments) {
    const auto count = static_cast<std::int64_t>(s.tokens.size());
    const std::int64_t blocks = ceil_div(count, kTaskQueries);
    const auto end_of = [&](std::int64_t block) {
      return std::min((block + 1) * kTaskQueries, count);
    };
    threads_.run(heads * blocks, [&](std::int64_t task, int) {
      const std::int64_t begin = task / heads * kTaskQueries;
      store_head(s, row + begin, end_of(task / heads) - begin, layer, task % heads);
    });
    // The last queries see the most keys: they start first.
    threads_.run(heads * blocks, [&](std::int64_t task, int thread) {
      const std::int64_t block = blocks - 1 - task / heads;
      attend_head(s, row, block * kTaskQueries, end_of(block), layer, task % heads, thread);
    });
    row += count;
  }
}

void Transformer::run_layer(std::span<const Segment> segments, std::int64_t index) {
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const Job qkv{{product(layer.qkv, layer.qkv_bias, norm_a_, qkv_, false)}};
  const Product out =
      product(layer.attention_out, layer.attention_out_bias, attention_, hidden_, true);
  const Job up{{product(layer.mlp_up, layer.mlp_up_bias, norm_b_, mlp_, false)}, true};
  const Product down = product(layer.mlp_down, layer.mlp_down_bias, mlp_, hidden_, true);

  normalize(layer.input_norm, norm_a_);
  if (config_.parallel_residual) {
    normalize(layer.post_norm, norm_b_);
    multiply_all(std::array{qkv, up});
    attention(segments, index);
    multiply_all(std::array{Job{{down, out}}});
  } else {
    multiply_all(std::array{qkv});
    attention(segments, index);
    multiply_all(std::array{Job{{out}}});
    normalize(layer.post_norm, norm_b_);
    multiply_all(std::array{up});
    multiply_all(std::array{Job{{down}}});
  }
}

void Transformer::run(std::span<const Segment> segments) {
  rows_ = 0;
  for (const Segment& s : segments) rows_ += static_cast<std::int64_t>(s.tokens.size());
  reserve(rows_);
  embed(segments);
  for (std::int64_t i = 0; i < config_.num_layers; ++i) run_layer(segments, i);
}

void Transformer::logits(std::int64_t first, std::int64_t rows, float* out) {
  for (std::int64_t row = 0; row < rows; ++row) {
    layer_norm(hidden_.row(first + row), final_norm_.weight.data(), final_norm_.bias.data(),
               static_cast<float>(config_.layer_norm_eps), config_.hidden_size, norm_a_.row(row));
  }
  Product p{lm_head_, norm_a_.data.get(), norm_a_.stride, rows,
            out,      config_.vocab_size, nullptr,        false};
  multiply_all(std::array{Job{{p}}});
}

}  // namespace clusterfusion::cpu
