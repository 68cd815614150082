#include "support/reference_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/tensor_view.hpp"
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

Vector linear(const DLTensor& weight, const DLTensor* bias, const Vector& x) {
  const std::int64_t rows = weight.shape[0];
  const std::int64_t cols = weight.shape[1];
  Vector y(static_cast<std::size_t>(rows));
  for (std::int64_t r = 0; r < rows; ++r) {
    double sum = bias != nullptr && is_present(*bias) ? element(*bias, r) : 0.0;
    for (std::int64_t c = 0; c < cols; ++c) {
      sum += element(weight, r * cols + c) * x[static_cast<std::size_t>(c)];
    }
    y[static_cast<std::size_t>(r)] = sum;
  }
  return y;
}

Vector layer_norm(const DLTensor& weight, const DLTensor& bias, double eps, const Vector& x) {
  double mean = 0;
  for (const double v : x) mean += v / static_cast<double>(x.size());
  double variance = 0;
  for (const double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
  Vector y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    y[i] = (x[i] - mean) / std::sqrt(variance + eps) * element(weight, at) + element(bias, at);
  }
  return y;
}

void rotate(double* head, const ModelConfig& config, std::size_t position) {
  const std::int64_t half = config.rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.rotary_dim);
    const float power = static_cast<float>(std::pow(config.rope_theta, exponent));
    const float angle = static_cast<float>(position) * (1.0f / power);
    const double cos = std::cos(static_cast<double>(angle));
    const double sin = std::sin(static_cast<double>(angle));
    const double low = head[i];
    const double high = head[half + i];
    head[i] = low * cos - high * sin;
    head[half + i] = high * cos + low * sin;
  }
}

// Attention of all heads over rows of q, k, v of head 0, then of head 1, ...
Rows attention(const ModelConfig& config, Rows qkv) {
  const auto dim = static_cast<std::size_t>(config.head_dim);
  const auto heads = static_cast<std::size_t>(config.num_heads);
  for (std::size_t t = 0; t < qkv.size(); ++t) {
    for (std::size_t h = 0; h < heads; ++h) {
      rotate(&qkv[t][h * 3 * dim], config, t);
      rotate(&qkv[t][h * 3 * dim + dim], config, t);
    }
  }
  Rows out(qkv.size(), Vector(heads * dim, 0.0));
  for (std::size_t t = 0; t < qkv.size(); ++t) {
    for (std::size_t h = 0; h < heads; ++h) {
      const double* query = &qkv[t][h * 3 * dim];
      Vector weight(t + 1);
      for (std::size_t s = 0; s <= t; ++s) {
        const double* key = &qkv[s][h * 3 * dim + dim];
        for (std::size_t i = 0; i < dim; ++i) weight[s] += query[i] * key[i];
        weight[s] /= std::sqrt(static_cast<double>(dim));
      }
      const double largest = *std::max_element(weight.begin(), weight.end());
      double sum = 0;
      for (double& w : weight) sum += w = std::exp(w - largest);
      for (std::size_t s = 0; s <= t; ++s) {
        const double* value = &qkv[s][h * 3 * dim + 2 * dim];
        for (std::size_t i = 0; i < dim; ++i) out[t][h * dim + i] += weight[s] / sum * value[i];
      }
    }
  }
  return out;
}

Vector mlp(const ModelConfig& config, const LayerWeights& w, const Vector& x) {
  Vector up = linear(w.mlp_up_weight, &w.mlp_up_bias,
                     layer_norm(w.post_norm_weight, w.post_norm_bias, config.layer_norm_eps, x));
  for (double& v : up) v = reference_activation(config.activation, v);
  return linear(w.mlp_down_weight, &w.mlp_down_bias, up);
}

void add(Vector& to, const Vector& from) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

void run_layer(const ModelConfig& config, const LayerWeights& w, Rows& hidden) {
  Rows qkv;
  for (const Vector& x : hidden) {
    qkv.push_back(
        linear(w.qkv_weight, &w.qkv_bias,
               layer_norm(w.input_norm_weight, w.input_norm_bias, config.layer_norm_eps, x)));
  }
  const Rows attended = attention(config, std::move(qkv));
  for (std::size_t t = 0; t < hidden.size(); ++t) {
    const Vector out = linear(w.attention_out_weight, &w.attention_out_bias, attended[t]);
    if (config.parallel_residual) {
      const Vector both = mlp(config, w, hidden[t]);
      add(hidden[t], out);
      add(hidden[t], both);
    } else {
      add(hidden[t], out);
      add(hidden[t], mlp(config, w, hidden[t]));
    }
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
  for (const LayerWeights& layer : weights.layers) run_layer(config, layer, hidden);
  std::vector<double> logits;
  for (const Vector& x : hidden) {
    const Vector row = linear(
        weights.lm_head, nullptr,
        layer_norm(weights.final_norm_weight, weights.final_norm_bias, config.layer_norm_eps, x));
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

}  // namespace clusterfusion::test
