// Shapes of Pythia (float16), and of Llama and its relatives (bfloat16), with random weights: what
// the GPU benchmarks run on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/tensor_view.hpp"
#include "clusterfusion/model.hpp"
#include "model/layer_tensors.hpp"

namespace clusterfusion::benchmark {

struct Shape {
  const char* name;
  std::int64_t hidden, layers, heads, vocab;
  // Of Llama and its relatives; 0 for GPT-NeoX.
  std::int64_t kv_heads = 0, head_dim = 0, intermediate = 0;
  bool qk_norm = false, tied = false;

  bool is_llama() const noexcept { return kv_heads != 0; }
};
inline constexpr Shape kShapes[] = {
    {"pythia-14m", 128, 6, 4, 50304},
    {"pythia-31m", 256, 6, 8, 50304},
    {"pythia-70m", 512, 6, 8, 50304},
    {"pythia-160m", 768, 12, 12, 50304},
    {"pythia-410m", 1024, 24, 16, 50304},
    {"pythia-1b", 2048, 16, 8, 50304},
    {"pythia-1.4b", 2048, 24, 16, 50304},
    {"pythia-2.8b", 2560, 32, 32, 50304},
    {"pythia-6.9b", 4096, 32, 32, 50432},
    {"pythia-12b", 5120, 36, 40, 50688},
    {"gpt-neox-20b", 6144, 44, 64, 50432},
    {"llama-3.2-1b", 2048, 16, 32, 128256, 8, 64, 8192, false, true},
    {"llama-3.1-8b", 4096, 32, 32, 128256, 8, 128, 14336},
    {"mistral-7b", 4096, 32, 32, 32768, 8, 128, 14336},
    {"qwen3-0.6b", 1024, 28, 16, 151936, 8, 128, 3072, true, true},
    {"qwen3-1.7b", 2048, 28, 16, 151936, 8, 128, 6144, true, true},
    {"qwen3-8b", 4096, 36, 32, 151936, 8, 128, 12288, true},
};

// "pythia-14m, pythia-31m, ...".
inline std::string names_of_shapes() {
  std::string names;
  for (const Shape& shape : kShapes) names += (names.empty() ? "" : ", ") + std::string(shape.name);
  return names;
}

inline const Shape* find_shape(std::string_view name) {
  const auto found = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape& shape) { return name == shape.name; });
  return found == std::end(kShapes) ? nullptr : found;
}

inline ModelConfig config_of(const Shape& shape) {
  ModelConfig c;
  c.hidden_size = shape.hidden;
  c.num_layers = shape.layers;
  c.num_heads = shape.heads;
  c.head_dim = shape.hidden / shape.heads;
  c.intermediate_size = 4 * shape.hidden;
  c.vocab_size = shape.vocab;
  c.max_positions = 2048;
  c.rotary_dim = c.head_dim / 4;
  c.dtype = DType::float16;
  if (!shape.is_llama()) return c;
  c.model_type = shape.qk_norm ? "qwen3" : "llama";
  c.num_kv_heads = shape.kv_heads;
  c.head_dim = c.rotary_dim = shape.head_dim;
  c.intermediate_size = shape.intermediate;
  c.max_positions = 131072;
  c.norm = NormKind::rms_norm;
  c.parallel_residual = c.attention_bias = c.attention_out_bias = c.mlp_bias = false;
  c.gated_mlp = true;
  c.activation = Activation::silu;
  c.qkv_layout = QkvLayout::separate;
  c.qk_norm = shape.qk_norm;
  c.tied_embeddings = shape.tied;
  c.rope_theta = 5e5;
  c.dtype = DType::bfloat16;
  return c;
}

// Every tensor of a kind shares one host array; on the device each has its own place.
class SharedModel final : public Model {
 public:
  // In the shape's own type, or in `dtype`.
  explicit SharedModel(const Shape& shape, std::optional<DType> dtype = {}) {
    config_ = config_of(shape);
    if (dtype) config_.dtype = *dtype;
    const ModelConfig& c = config_;
    const std::int64_t most = std::max(c.vocab_size, c.intermediate_size) * c.hidden_size;
    values_.resize(most);
    std::uint32_t state = 12345;
    const float scale = std::sqrt(3.0f / static_cast<float>(c.hidden_size));
    for (auto& value : values_) {
      state = state * 1664525u + 1013904223u;
      value = narrow((static_cast<float>(state >> 8) / 8388608.0f - 1.0f) * scale);
    }
    ones_.assign(c.hidden_size, narrow(1.0f));
    const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
      return view(values_.data(), {rows, columns});
    };
    const auto vector = [&](std::int64_t count) { return view(values_.data(), {count}); };
    const auto ones = [&](std::int64_t count) { return view(ones_.data(), {count}); };
    weights_.embedding = matrix(c.vocab_size, c.hidden_size);
    weights_.lm_head = c.tied_embeddings ? weights_.embedding : matrix(c.vocab_size, c.hidden_size);
    weights_.final_norm_weight = ones(c.hidden_size);
    if (c.norm == NormKind::layer_norm) weights_.final_norm_bias = vector(c.hidden_size);
    LayerWeights layer;
    for (const auto& [tensor, shape] : layer_tensors(c)) {
      const bool is_gain = shape.size() == 1 && !is_bias(tensor);
      layer[tensor] = is_gain ? ones(shape[0]) : view(values_.data(), shape);
    }
    weights_.layers.assign(c.num_layers, layer);
  }
  std::optional<std::string> find_non_finite() const override { return std::nullopt; }

 private:
  // In the model's type.
  std::uint16_t narrow(float value) const {
    std::uint16_t bits;
    if (config_.dtype == DType::bfloat16) {
      const __nv_bfloat16 half = __float2bfloat16_rn(value);
      std::memcpy(&bits, &half, 2);
    } else {
      const __half half = __float2half_rn(value);
      std::memcpy(&bits, &half, 2);
    }
    return bits;
  }
  DLTensor view(void* data, std::vector<std::int64_t> shape) {
    shapes_.push_back(std::make_unique<std::vector<std::int64_t>>(std::move(shape)));
    auto& dims = *shapes_.back();
    return {data,
            {kDLCPU, 0},
            static_cast<int>(dims.size()),
            to_dl(config_.dtype),
            dims.data(),
            nullptr,
            0};
  }
  std::vector<std::uint16_t> values_, ones_;
  std::vector<std::unique_ptr<std::vector<std::int64_t>>> shapes_;
};

}  // namespace clusterfusion::benchmark
