#include "support/random_model.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "model/layer_tensors.hpp"

namespace clusterfusion::test {
namespace {

// SplitMix64 (Steele, Lea and Flood 2014): fast, and the same everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // Uniform in [-1, 1).
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-23f - 1.0f; }

 private:
  std::uint64_t state_;
};

class RandomModel final : public Model {
 public:
  RandomModel(const ModelConfig& config, const RandomModelOptions& options)
      : options_(options), random_(options.seed) {
    config_ = config;
    folder_ = "random-model-in-memory";
    const std::int64_t hidden = config.hidden_size;
    weights_.embedding = matrix("embedding", config.vocab_size, hidden);
    for (std::int64_t i = 0; i < config.num_layers; ++i) weights_.layers.push_back(layer(i));
    weights_.final_norm_weight = vector("final_norm.weight", hidden, 1.0f);
    if (config.norm == NormKind::layer_norm) {
      weights_.final_norm_bias = vector("final_norm.bias", hidden, 0.0f);
    }
    weights_.lm_head =
        config.tied_embeddings ? weights_.embedding : matrix("lm_head", config.vocab_size, hidden);
  }

  std::optional<std::string> find_non_finite() const override {
    for (const Tensor& tensor : tensors_) {
      for (std::int64_t i = 0; i < tensor.count; ++i) {
        const float value = value_at(tensor, i);
        if (!std::isfinite(value)) {
          return fmt::format("tensor {} [{}] = {} in memory", tensor.name, i, value);
        }
      }
    }
    return std::nullopt;
  }

 private:
  struct Tensor {
    std::string name;
    DType dtype;
    std::int64_t count;
    std::unique_ptr<std::byte[]> data;
    std::unique_ptr<std::int64_t[]> shape;
  };

  LayerWeights layer(std::int64_t index) {
    LayerWeights weights;
    for (const auto& [role, shape] : layer_tensors(config_)) {
      constexpr const char* kModules[] = {"input_norm", "post_norm", "qkv",           "mlp_gate",
                                          "mlp_up",     "mlp_down",  "attention_out", "query",
                                          "key",        "value",     "query_norm",    "key_norm"};
      const std::string name = fmt::format("layers.{}.{}.{}", index, kModules[index_of(role) / 2],
                                           is_bias(role) ? "bias" : "weight");
      weights[role] = shape.size() == 2 ? matrix(name, shape[0], shape[1])
                                        : vector(name, shape[0], is_bias(role) ? 0.0f : 1.0f);
    }
    return weights;
  }

  DLTensor matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    const float scale = options_.matrix_scale * std::sqrt(3.0f / static_cast<float>(cols));
    return tensor(name, config_.dtype, {rows, cols}, 0.0f, scale);
  }
  DLTensor vector(const std::string& name, std::int64_t count, float centre) {
    return tensor(name, options_.vector_dtype, {count}, centre, 0.1f);
  }

  DLTensor tensor(const std::string& name, DType dtype, std::vector<std::int64_t> shape,
                  float centre, float scale) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    const auto elements = static_cast<std::size_t>(count);
    Tensor t{name, dtype, count,
             std::make_unique_for_overwrite<std::byte[]>(elements * size_of(dtype)),
             std::make_unique<std::int64_t[]>(shape.size())};
    std::copy(shape.begin(), shape.end(), t.shape.get());
    fill(t, centre, scale);
    DLTensor view{};
    view.data = t.data.get();
    view.device = {kDLCPU, 0};
    view.ndim = static_cast<int>(shape.size());
    view.dtype = to_dl(dtype);
    view.shape = t.shape.get();
    tensors_.push_back(std::move(t));
    return view;
  }

  // Large tensors repeat a random block: distinct numbers enough, and quickly made.
  void fill(Tensor& t, float centre, float scale) {
    constexpr std::int64_t kBlock = (1 << 20) + 7;
    const std::int64_t size = size_of(t.dtype);
    for (std::int64_t i = 0; i < t.count; ++i) {
      if (i == kBlock) return repeat(t.data.get(), kBlock * size, t.count * size);
      const float value = centre + scale * random_.uniform();
      if (t.dtype == DType::float32) {
        std::memcpy(t.data.get() + 4 * i, &value, 4);
      } else {
        const std::uint16_t bits = narrow(value, t.dtype);
        std::memcpy(t.data.get() + 2 * i, &bits, 2);
      }
    }
  }

  static void repeat(std::byte* data, std::int64_t period, std::int64_t bytes) {
    for (std::int64_t at = period; at < bytes; at += period) {
      std::memcpy(data + at, data, static_cast<std::size_t>(std::min(period, bytes - at)));
    }
  }

  static float value_at(const Tensor& t, std::int64_t i) {
    if (t.dtype == DType::float32) {
      float value = 0;
      std::memcpy(&value, t.data.get() + 4 * i, 4);
      return value;
    }
    std::uint16_t bits = 0;
    std::memcpy(&bits, t.data.get() + 2 * i, 2);
    return widen(bits, t.dtype);
  }

  RandomModelOptions options_;
  Random random_;
  std::vector<Tensor> tensors_;
};

}  // namespace

std::uint16_t narrow(float value, DType dtype) {
  // Scaled so that the wanted precision is that of an integer, which nearbyint rounds.
  const int digits = dtype == DType::float16 ? 11 : 8;
  const int lowest = dtype == DType::float16 ? -14 : -126;
  const int bias = dtype == DType::float16 ? 15 : 127;
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int fraction_bits = digits - 1;
  const auto infinity = static_cast<std::uint16_t>((2 * bias + 1) << fraction_bits);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | infinity | 1);
  if (std::isinf(value)) return static_cast<std::uint16_t>(sign | infinity);
  if (value == 0.0f) return sign;
  const int exponent = std::max(std::ilogb(value), lowest);
  const double steps =
      std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), fraction_bits - exponent));
  // steps == 2^digits carries into the exponent by itself.
  const int biased = exponent + bias - 1;  // the implicit bit adds one
  const auto bits =
      static_cast<std::int64_t>(steps) + (static_cast<std::int64_t>(biased) << fraction_bits);
  return static_cast<std::uint16_t>(sign | std::min<std::int64_t>(bits, infinity));
}

float widen(std::uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  double value = 0;
  if (exponent == 31) {
    value = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else {
    value = std::ldexp(1024 + fraction, exponent - 25);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -value : value);
}

std::shared_ptr<const Model> make_random_model(ModelConfig config,
                                               const RandomModelOptions& options) {
  if (config.head_dim == 0) config.head_dim = config.hidden_size / config.num_heads;
  return std::make_shared<RandomModel>(config, options);
}

ModelConfig small_config() {
  ModelConfig config;
  config.vocab_size = 301;
  config.hidden_size = 64;
  config.num_layers = 2;
  config.num_heads = 4;
  config.head_dim = 16;
  config.intermediate_size = 256;
  config.max_positions = 512;
  config.rotary_dim = 4;
  config.dtype = DType::float16;
  config.hidden_act = "gelu";
  return config;
}

ModelConfig small_llama_config() {
  ModelConfig config;
  config.model_type = "qwen3";
  config.vocab_size = 301;
  config.hidden_size = 100;
  config.num_layers = 3;
  config.num_heads = 9;
  config.num_kv_heads = 3;
  config.head_dim = config.rotary_dim = 24;
  config.rope_theta = 500000.0;
  config.intermediate_size = 250;
  config.max_positions = 512;
  config.norm = NormKind::rms_norm;
  config.layer_norm_eps = 1e-6;
  config.activation = Activation::silu;
  config.hidden_act = "silu";
  config.parallel_residual = false;
  config.gated_mlp = true;
  config.attention_out_bias = config.mlp_bias = false;
  config.qkv_layout = QkvLayout::separate;
  config.qk_norm = true;
  config.dtype = DType::bfloat16;
  return config;
}

ModelConfig pythia_410m_config() {
  ModelConfig config;
  config.vocab_size = 50304;
  config.hidden_size = 1024;
  config.num_layers = 24;
  config.num_heads = 16;
  config.head_dim = 64;
  config.intermediate_size = 4096;
  config.max_positions = 2048;
  config.rotary_dim = 16;
  config.dtype = DType::float16;
  config.hidden_act = "gelu";
  return config;
}

}  // namespace clusterfusion::test
