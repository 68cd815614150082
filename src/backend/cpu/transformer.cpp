#include "backend/cpu/transformer.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <new>

#include "backend/backend.hpp"
#include "backend/cpu/rotary.hpp"
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
      program_(plan::make_layer_program(config_)),
      phases_(plan::phases_of(program_)),
      rotary_(config_),
      embedding_(matrix_of(model.weights().embedding)),
      lm_head_(matrix_of(model.weights().lm_head)),
      final_norm_weight_(vector_of(model.weights().final_norm_weight)),
      final_norm_bias_(vector_of(model.weights().final_norm_bias)),
      hooks_(model.config()) {
  for (const LayerWeights& weights : model.weights().layers) {
    Layer& layer = layers_.emplace_back();
    for (std::size_t i = 0; i < kNumLayerTensors; ++i) {
      const DLTensor& tensor = weights.tensors[i];
      if (!is_present(tensor)) continue;
      if (tensor.ndim == 2) layer.matrices[i] = matrix_of(tensor);
      if (tensor.ndim == 1) layer.vectors[i] = vector_of(tensor);
    }
  }
  cos_sin_.stride = config_.rotary_dim;
  std::int64_t row_bytes = 4 * cos_sin_.stride;
  for (std::size_t place = 0; place < at_.size(); ++place) {
    const std::int64_t width = plan::width_of(static_cast<plan::Place>(place), config_);
    if (width == 0) continue;
    // A little beyond the width: rows that lie a power of two apart share cache sets.
    at_[place].stride = padded(width) + kLanes;
    row_bytes += 4 * at_[place].stride;
  }
  branch_.stride = at(plan::Place::residual).stride;
  max_rows_ = std::clamp<std::int64_t>(kActivationBytes / row_bytes / kTaskQueries * kTaskQueries,
                                       kTaskQueries, kMaxRows);
  attention_scratch_.assign(
      static_cast<std::size_t>(threads.size()),
      std::vector<float>(static_cast<std::size_t>(attention_scratch(config_.head_dim))));
}

std::int64_t Transformer::Job::row_bytes() const noexcept {
  std::int64_t bytes = 0;
  for (const JobStep& step : steps) {
    bytes += step.product.weights.cols * size_of(step.product.weights.dtype);
  }
  return bytes;
}

void Transformer::reserve(std::int64_t rows) {
  for (Activations& a : at_) reserve(a, rows);
  reserve(cos_sin_, rows);
}

void Transformer::reserve(Activations& activations, std::int64_t rows) {
  if (activations.rows >= rows) return;
  const auto count = static_cast<std::size_t>(std::max<std::int64_t>(rows * activations.stride, 1));
  activations.rows = 0;
  activations.data = hwy::AllocateAligned<float>(count);
  require(activations.data != nullptr, ErrorKind::out_of_memory,
          "activations of {} tokens need {} bytes, which the machine does not have", rows,
          count * sizeof(float));
  std::fill_n(activations.data.get(), count, 0.0f);
  activations.rows = rows;
}

void Transformer::embed(std::span<const Segment> segments) {
  positions_.clear();
  std::int64_t row = 0;
  for (const Segment& segment : segments) {
    std::int64_t position = segment.first_position;
    for (const TokenId token : segment.tokens) {
      const std::byte* from = embedding_.data + token * embedding_.cols * size_of(embedding_.dtype);
      widen(embedding_.dtype, from, embedding_.cols, at(plan::Place::residual).row(row));
      float* cos_sin = cos_sin_.row(row++);
      for (std::size_t i = 0; i < rotary_.pairs(); ++i) {
        const auto [cos, sin] = rotary_.turn(position, i);
        cos_sin[i] = cos;
        cos_sin[rotary_.pairs() + i] = sin;
      }
      positions_.push_back(position++);
    }
  }
}

void Transformer::normalize_row(std::span<const float> weight, std::span<const float> bias,
                                std::int64_t row, float* out) {
  const float* x = at(plan::Place::residual).row(row);
  const auto eps = static_cast<float>(config_.layer_norm_eps);
  if (config_.norm == NormKind::rms_norm) {
    return rms_norm(x, weight.data(), eps, config_.hidden_size, out);
  }
  layer_norm(x, weight.data(), bias.data(), eps, config_.hidden_size, out);
}

void Transformer::normalize(std::span<const float> weight, std::span<const float> bias,
                            Activations& out) {
  const auto one_row = [&](std::int64_t row, int) {
    normalize_row(weight, bias, row, out.row(row));
  };
  if (rows_ * config_.hidden_size >= kSerialValues) return threads_.run(rows_, one_row);
  for (std::int64_t row = 0; row < rows_; ++row) one_row(row, 0);
}

Product Transformer::product(const Layer& layer, const plan::Step& step) const {
  const std::vector<float>& bias = layer.vectors[index_of(bias_of(step.weight))];
  return {layer.matrices[index_of(step.weight)],
          at(step.input).data.get(),
          at(step.input).stride,
          rows_,
          at(step.output).data.get(),
          at(step.output).stride,
          bias.empty() ? nullptr : bias.data(),
          step.epilogue == plan::Epilogue::add_to_output};
}

// Few tokens: reading the weights counts. Each task reads a long stretch, half of
// an even share of what is left, so that streams are long and yet all threads end together.
std::vector<Transformer::Task> Transformer::streaming_tasks(std::span<const Job> jobs) const {
  const std::int64_t tokens = jobs[0].tokens();
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
  const std::int64_t tokens = jobs[0].tokens();
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

void Transformer::compute(const Task& task) const {
  const std::int64_t rows = task.row_end - task.row;
  for (const auto& [whole, epilogue] : task.job->steps) {
    Product p = whole;
    p.in += task.token * p.in_stride;
    p.out += task.token * p.out_stride;
    p.tokens = task.token_end - task.token;
    multiply(p, task.row, task.row_end);
    for (std::int64_t t = 0; t < p.tokens; ++t) {
      float* out = p.out + t * p.out_stride + task.row;
      if (epilogue == plan::Epilogue::activate) activate(config_.activation, out, rows);
      if (epilogue != plan::Epilogue::times_gate) continue;
      const float* gate = at(plan::Place::gate).row(task.token + t) + task.row;
      for (std::int64_t i = 0; i < rows; ++i) out[i] *= gate[i];
    }
  }
}

void Transformer::multiply_all(std::span<const Job> jobs) {
  const bool few = jobs[0].tokens() <= kFewTokens;
  const std::vector<Task> tasks = few ? streaming_tasks(jobs) : tiled_tasks(jobs);
  threads_.run(static_cast<std::int64_t>(tasks.size()),
               [&](std::int64_t index, int) { compute(tasks[static_cast<std::size_t>(index)]); });
}

// Part `part` of a head of keys and values: its queries, then its key and its value.
float* Transformer::qkv_part(std::int64_t row, std::int64_t kv_head,
                             std::int64_t part) const noexcept {
  const std::int64_t parts = config_.heads_per_kv_head() + 2;
  return at(plan::Place::qkv).row(row) + (kv_head * parts + part) * config_.head_dim;
}

float* Transformer::query(std::int64_t row, std::int64_t head) const noexcept {
  if (is_separate()) return at(plan::Place::queries).row(row) + head * config_.head_dim;
  const std::int64_t group = config_.heads_per_kv_head();
  return qkv_part(row, head / group, head % group);
}

float* Transformer::key(std::int64_t row, std::int64_t kv_head) const noexcept {
  if (is_separate()) return at(plan::Place::keys).row(row) + kv_head * config_.head_dim;
  return qkv_part(row, kv_head, config_.heads_per_kv_head());
}

float* Transformer::value(std::int64_t row, std::int64_t kv_head) const noexcept {
  if (is_separate()) return at(plan::Place::values).row(row) + kv_head * config_.head_dim;
  return qkv_part(row, kv_head, config_.heads_per_kv_head() + 1);
}

void Transformer::prepare(float* head, LayerTensor norm, std::int64_t row, std::int64_t layer,
                          int thread) {
  if (config_.qk_norm) {
    const std::vector<float>& weight =
        layers_[static_cast<std::size_t>(layer)].vectors[index_of(norm)];
    // rms_norm() pads what it writes, and another head comes next here.
    float* normed = attention_scratch_[static_cast<std::size_t>(thread)].data();
    rms_norm(head, weight.data(), static_cast<float>(config_.layer_norm_eps), config_.head_dim,
             normed);
    std::copy_n(normed, config_.head_dim, head);
  }
  rotate(head, cos_sin_.row(row), config_.rotary_dim);
}

void Transformer::store_head(const Segment& segment, std::int64_t row, std::int64_t count,
                             std::int64_t layer, std::int64_t kv_head, int thread) {
  const std::int64_t group = config_.heads_per_kv_head();
  for (std::int64_t r = row; r < row + count; ++r) {
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      prepare(query(r, head), LayerTensor::query_norm_weight, r, layer, thread);
    }
    prepare(key(r, kv_head), LayerTensor::key_norm_weight, r, layer, thread);
    const std::int64_t position = positions_[static_cast<std::size_t>(r)];
    std::byte* page = segment.pages[static_cast<std::size_t>(position / kKvPagePositions)];
    store_key_value(pool_.layout(), key(r, kv_head), value(r, kv_head), position % kKvPagePositions,
                    page + pool_.offset(layer, kv_head));
  }
}

void Transformer::attend_head(const Segment& segment, std::int64_t row, std::int64_t begin,
                              std::int64_t end, std::int64_t layer, std::int64_t head, int thread) {
  const std::int64_t kv_head = head / config_.heads_per_kv_head();
  Activations& heads = at(plan::Place::heads);
  AttentionTask task;
  task.layout = pool_.layout();
  task.pages = segment.pages.data();
  task.page_offset = pool_.offset(layer, kv_head);
  task.first_position = segment.first_position + begin;
  task.queries = end - begin;
  task.query = query(row + begin, head);
  task.query_stride = at(is_separate() ? plan::Place::queries : plan::Place::qkv).stride;
  task.out = heads.row(row + begin) + head * config_.head_dim;
  task.out_stride = heads.stride;
  task.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config_.head_dim)));
  attend(task, attention_scratch_[static_cast<std::size_t>(thread)].data());
}

void Transformer::attention(std::span<const Segment> segments, std::int64_t layer) {
  const std::int64_t heads = config_.num_heads;
  const std::int64_t kv_heads = config_.kv_heads();
  const std::int64_t group = config_.heads_per_kv_head();
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
    threads_.run(static_cast<std::int64_t>(segments.size()) * kv_heads,
                 [&](std::int64_t task, int thread) {
                   const auto index = static_cast<std::size_t>(task / kv_heads);
                   const std::int64_t kv_head = task % kv_heads;
                   const Segment& s = segments[index];
                   const auto count = static_cast<std::int64_t>(s.tokens.size());
                   store_head(s, first_row[index], count, layer, kv_head, thread);
                   for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                     attend_head(s, first_row[index], 0, count, layer, head, thread);
                   }
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
    threads_.run(kv_heads * blocks, [&](std::int64_t task, int thread) {
      const std::int64_t begin = task / kv_heads * kTaskQueries;
      store_head(s, row + begin, end_of(task / kv_heads) - begin, layer, task % kv_heads, thread);
    });
    // The last queries see the most keys: they start first.
    threads_.run(heads * blocks, [&](std::int64_t task, int thread) {
      const std::int64_t block = blocks - 1 - task / heads;
      attend_head(s, row, block * kTaskQueries, end_of(block), layer, task % heads, thread);
    });
    row += count;
  }
}

// x += branch, by way of memory of its own, for a hook to look at it; the sums are the same.
void Transformer::add_branch(Product product, LayerHooks::Branch branch, std::int64_t layer) {
  reserve(branch_, rows_);
  product.out = branch_.data.get();
  product.out_stride = branch_.stride;
  product.add_to_out = false;
  multiply_all(std::array{Job{{{product}}}});
  hooks_.at_branch(branch, layer, branch_.hooked());
  for (std::int64_t row = 0; row < rows_; ++row) {
    float* to = at(plan::Place::residual).row(row);
    const float* from = branch_.row(row);
    for (std::int64_t i = 0; i < config_.hidden_size; ++i) to[i] += from[i];
  }
}

// Those that take up another's results belong to its job; those that a hook looks at come by
// themselves.
void Transformer::run_products(std::int64_t layer, std::span<const plan::Step> phase) {
  const Layer& weights = layers_[static_cast<std::size_t>(layer)];
  const bool looks = hooks_.look_at_branches(layer);
  std::vector<Job> jobs;
  std::vector<std::size_t> job_of(program_.size(), program_.size());
  for (const plan::Step& step : phase) {
    if (looks && step.epilogue == plan::Epilogue::add_to_output) continue;
    const auto index = static_cast<std::size_t>(&step - program_.data());
    std::size_t job = jobs.size();
    for (std::size_t i = 0; i < index; ++i) {
      if (step.waits_for(i)) job = std::min(job, job_of[i]);
    }
    if (job == jobs.size()) jobs.emplace_back();
    job_of[index] = job;
    jobs[job].steps.push_back({product(weights, step), step.epilogue});
  }
  if (!jobs.empty()) multiply_all(jobs);
  for (const plan::Step& step : phase) {
    if (!looks || step.epilogue != plan::Epilogue::add_to_output) continue;
    using Branch = LayerHooks::Branch;
    add_branch(product(weights, step), step.of_mlp ? Branch::mlp : Branch::attention, layer);
  }
}

void Transformer::run_layer(std::span<const Segment> segments, std::int64_t index) {
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  hooks_.before_layer(index, at(plan::Place::residual).hooked());
  for (const std::span<const plan::Step> phase : phases_) {
    switch (phase[0].operation) {
      case plan::Operation::norm:
        for (const plan::Step& step : phase) {
          normalize(layer.vectors[index_of(step.weight)],
                    layer.vectors[index_of(bias_of(step.weight))], at(step.output));
        }
        break;
      case plan::Operation::product: run_products(index, phase); break;
      case plan::Operation::attention:
        attention(segments, index);
        hooks_.at_heads(index, at(plan::Place::heads).hooked());
        break;
    }
  }
  hooks_.after_layer(index, at(plan::Place::residual).hooked());
}

void Transformer::run(std::span<const Segment> segments) {
  rows_ = 0;
  for (const Segment& s : segments) rows_ += static_cast<std::int64_t>(s.tokens.size());
  reserve(rows_);
  hook(segments);
  embed(segments);
  for (std::int64_t i = 0; i < config_.num_layers; ++i) run_layer(segments, i);
  hand_out_final_norm();
}

void Transformer::hook(std::span<const Segment> segments) {
  hooks_.clear();
  std::int64_t row = 0;
  for (const Segment& s : segments) {
    const auto count = static_cast<std::int64_t>(s.tokens.size());
    hooks_.add({row, count, s.first_position, s.interventions, s.activations});
    row += count;
  }
}

void Transformer::hand_out_final_norm() {
  if (!hooks_.want({ActivationKind::final_norm, 0})) return;
  Activations& normed = at(plan::Place::attention_in);
  normalize(final_norm_weight_, final_norm_bias_, normed);
  hooks_.at_final_norm(normed.hooked());
}

void Transformer::logits(std::span<const std::int64_t> rows, float* out) {
  Activations& normed = at(plan::Place::attention_in);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    normalize_row(final_norm_weight_, final_norm_bias_, rows[i],
                  normed.row(static_cast<std::int64_t>(i)));
  }
  const Product head{lm_head_, normed.data.get(),  normed.stride, std::ssize(rows),
                     out,      config_.vocab_size, nullptr,       false};
  multiply_all(std::array{Job{{{head}}}});
}

}  // namespace clusterfusion::cpu
