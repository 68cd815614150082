#include "support/reference_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>

#include "base/tensor_view.hpp"
#include "base/thread_pool.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

using Vector = std::vector<double>;
using Rows = std::vector<Vector>;

double element(const DLTensor& tensor, std::int64_t index) {
  const std::byte* data = data_of(tensor);
  const DType dtype = *dtype_of(tensor);
  if (dtype == DType::float32) {
    float value = 0;
    std::memcpy(&value, data + 4 * index, 4);
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, data + 2 * index, 2);
  return widen(bits, dtype);
}

Vector row_of(const DLTensor& matrix, std::int64_t row) {
  Vector values(static_cast<std::size_t>(matrix.shape[1]));
  for (std::size_t c = 0; c < values.size(); ++c) {
    values[c] = element(matrix, row * matrix.shape[1] + static_cast<std::int64_t>(c));
  }
  return values;
}

// Several sums side by side: one alone would wait for each of its additions.
double dot(const Vector& a, const Vector& b) {
  constexpr std::size_t kSums = 8;
  double sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums <= a.size(); i += kSums) {
    for (std::size_t j = 0; j < kSums; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < a.size(); ++i) sums[0] += a[i] * b[i];
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

// Every row of `x` through one matrix; the matrix's rows are shared out over the threads. `bias`
// may be absent.
Rows linear(ThreadPool& pool, const DLTensor& weight, const DLTensor& bias, const Rows& x) {
  const std::int64_t rows = weight.shape[0];
  Rows y(x.size(), Vector(static_cast<std::size_t>(rows)));
  pool.run(rows, [&](std::int64_t r, int) {
    const Vector row = row_of(weight, r);
    const double start = is_present(bias) ? element(bias, r) : 0.0;
    for (std::size_t t = 0; t < x.size(); ++t) {
      y[t][static_cast<std::size_t>(r)] = start + dot(row, x[t]);
    }
  });
  return y;
}

// `bias` may be absent.
Vector norm(const ModelConfig& config, const DLTensor& weight, const DLTensor& bias,
            const Vector& x) {
  const auto count = static_cast<double>(x.size());
  double mean = 0;
  if (config.norm == NormKind::layer_norm) {
    for (const double v : x) mean += v / count;
  }
  double variance = 0;
  for (const double v : x) variance += (v - mean) * (v - mean) / count;
  Vector y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    y[i] = (x[i] - mean) / std::sqrt(variance + config.layer_norm_eps) * element(weight, at);
    if (is_present(bias)) y[i] += element(bias, at);
  }
  return y;
}

Rows norm(const ModelConfig& config, const DLTensor& weight, const DLTensor& bias, const Rows& x) {
  Rows y;
  for (const Vector& row : x) y.push_back(norm(config, weight, bias, row));
  return y;
}

void rotate(double* head, const ModelConfig& config, std::size_t position) {
  const std::int64_t half = config.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config.rotary_dim);
    const double angle = static_cast<double>(position) * std::pow(config.rope_theta, exponent);
    const double cos = std::cos(angle);
    const double sin = std::sin(angle);
    const double low = head[i];
    const double high = head[half + i];
    head[i] = low * cos - high * sin;
    head[half + i] = high * cos + low * sin;
  }
}

// Of each token, heads one after the other.
struct Heads {
  Rows queries, keys, values;
};

// One matrix gives, for each head of keys and values, its queries, its key and its value.
Heads taken_apart(const ModelConfig& config, const Rows& qkv) {
  const std::int64_t group = config.num_heads / config.kv_heads();
  Heads heads{Rows(qkv.size()), Rows(qkv.size()), Rows(qkv.size())};
  for (std::size_t t = 0; t < qkv.size(); ++t) {
    auto from = qkv[t].begin();
    const auto take = [&](Vector& to, std::int64_t count) {
      to.insert(to.end(), from, from + count * config.head_dim);
      from += count * config.head_dim;
    };
    for (std::int64_t head = 0; head < config.kv_heads(); ++head) {
      take(heads.queries[t], group);
      take(heads.keys[t], 1);
      take(heads.values[t], 1);
    }
  }
  return heads;
}

Heads project(ThreadPool& pool, const ModelConfig& config, const LayerWeights& w, const Rows& x) {
  const auto product = [&](LayerTensor weight) {
    return linear(pool, w[weight], w[bias_of(weight)], x);
  };
  if (config.qkv_layout == QkvLayout::by_kv_head) {
    return taken_apart(config, product(LayerTensor::qkv_weight));
  }
  return {product(LayerTensor::query_weight), product(LayerTensor::key_weight),
          product(LayerTensor::value_weight)};
}

// Normalises, if the model does so, and rotates each head.
void prepare(const ModelConfig& config, const DLTensor& weight, Rows& rows) {
  const std::int64_t dim = config.head_dim;
  for (std::size_t t = 0; t < rows.size(); ++t) {
    for (auto head = rows[t].begin(); head != rows[t].end(); head += dim) {
      if (config.qk_norm) {
        ModelConfig of_head = config;
        of_head.norm = NormKind::rms_norm;
        const Vector normed = norm(of_head, weight, DLTensor{}, Vector(head, head + dim));
        std::copy(normed.begin(), normed.end(), head);
      }
      rotate(&*head, config, t);
    }
  }
}

// The attention of the query heads that share a head of keys and values.
void attend(const ModelConfig& config, std::size_t kv_head, const Heads& heads, Rows& out) {
  const auto dim = static_cast<std::size_t>(config.head_dim);
  const auto group = static_cast<std::size_t>(config.num_heads / config.kv_heads());
  for (std::size_t t = 0; t < out.size(); ++t) {
    for (std::size_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const double* query = &heads.queries[t][head * dim];
      Vector weight(t + 1);
      for (std::size_t s = 0; s <= t; ++s) {
        const double* key = &heads.keys[s][kv_head * dim];
        for (std::size_t i = 0; i < dim; ++i) weight[s] += query[i] * key[i];
        weight[s] /= std::sqrt(static_cast<double>(dim));
      }
      const double largest = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& w : weight) sum += w = std::exp(w - largest);
      double* result = &out[t][head * dim];
      for (std::size_t s = 0; s <= t; ++s) {
        const double* value = &heads.values[s][kv_head * dim];
        for (std::size_t i = 0; i < dim; ++i) result[i] += weight[s] / sum * value[i];
      }
    }
  }
}

Rows attention(ThreadPool& pool, const ModelConfig& config, const LayerWeights& w, const Rows& x) {
  Heads heads = project(pool, config, w, x);
  prepare(config, w[LayerTensor::query_norm_weight], heads.queries);
  prepare(config, w[LayerTensor::key_norm_weight], heads.keys);
  Rows out(x.size(), Vector(static_cast<std::size_t>(config.num_heads * config.head_dim), 0.0));
  pool.run(config.kv_heads(), [&](std::int64_t kv_head, int) {
    attend(config, static_cast<std::size_t>(kv_head), heads, out);
  });
  return out;
}

Rows mlp(ThreadPool& pool, const ModelConfig& config, const LayerWeights& w, const Rows& x) {
  const Rows normed =
      norm(config, w[LayerTensor::post_norm_weight], w[LayerTensor::post_norm_bias], x);
  Rows up = linear(pool, w[LayerTensor::mlp_up_weight], w[LayerTensor::mlp_up_bias], normed);
  Rows gate;
  if (config.gated_mlp) {
    gate = linear(pool, w[LayerTensor::mlp_gate_weight], w[LayerTensor::mlp_gate_bias], normed);
  }
  for (std::size_t t = 0; t < up.size(); ++t) {
    for (std::size_t i = 0; i < up[t].size(); ++i) {
      up[t][i] = config.gated_mlp ? reference_activation(config.activation, gate[t][i]) * up[t][i]
                                  : reference_activation(config.activation, up[t][i]);
    }
  }
  return linear(pool, w[LayerTensor::mlp_down_weight], w[LayerTensor::mlp_down_bias], up);
}

void add(Rows& to, const Rows& from) {
  for (std::size_t t = 0; t < to.size(); ++t) {
    for (std::size_t i = 0; i < to[t].size(); ++i) to[t][i] += from[t][i];
  }
}

void run_layer(ThreadPool& pool, const ModelConfig& config, const LayerWeights& w, Rows& hidden) {
  const Rows normed =
      norm(config, w[LayerTensor::input_norm_weight], w[LayerTensor::input_norm_bias], hidden);
  const Rows attended = attention(pool, config, w, normed);
  const Rows out = linear(pool, w[LayerTensor::attention_out_weight],
                          w[LayerTensor::attention_out_bias], attended);
  if (config.parallel_residual) {
    const Rows both = mlp(pool, config, w, hidden);
    add(hidden, out);
    add(hidden, both);
  } else {
    add(hidden, out);
    add(hidden, mlp(pool, config, w, hidden));
  }
}

}  // namespace

double reference_activation(Activation activation, double x) {
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  switch (activation) {
    case Activation::gelu_erf: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: {
      const double inner = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
      return x * sigmoid(2.0 * inner);  // (1 + tanh y) / 2 = sigmoid(2 y)
    }
    case Activation::gelu_quick: return x * sigmoid(1.702 * x);
    case Activation::relu: return std::max(x, 0.0);
    case Activation::relu_squared: return std::max(x, 0.0) * std::max(x, 0.0);
    case Activation::silu: return x * sigmoid(x);
    case Activation::mish: return x * std::tanh(std::log1p(std::exp(x)));
    case Activation::tanh: return std::tanh(x);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::identity: return x;
  }
  return NAN;
}

std::vector<double> reference_logits(const Model& model, std::span<const TokenId> tokens) {
  const ModelConfig& config = model.config();
  const ModelWeights& weights = model.weights();
  Rows hidden;
  for (const TokenId token : tokens) {
    Vector x(static_cast<std::size_t>(config.hidden_size));
    for (std::int64_t i = 0; i < config.hidden_size; ++i) {
      x[static_cast<std::size_t>(i)] = element(weights.embedding, token * config.hidden_size + i);
    }
    hidden.push_back(std::move(x));
  }
  ThreadPool pool(usable_cores());
  for (const LayerWeights& layer : weights.layers) run_layer(pool, config, layer, hidden);
  const Rows rows =
      linear(pool, weights.lm_head, DLTensor{},
             norm(config, weights.final_norm_weight, weights.final_norm_bias, hidden));
  std::vector<double> logits;
  for (const Vector& row : rows) logits.insert(logits.end(), row.begin(), row.end());
  return logits;
}

}  // namespace clusterfusion::test
