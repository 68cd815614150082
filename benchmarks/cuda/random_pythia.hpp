// Pythia's shapes with random float16 weights: what the GPU benchmarks run on.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

#include "base/tensor_view.hpp"
#include "clusterfusion/model.hpp"
#include "model/layer_tensors.hpp"

namespace clusterfusion::benchmark {

struct Shape {
  const char* name;
  std::int64_t hidden, layers, heads, vocab;
};
inline constexpr Shape kShapes[] = {
    {"pythia-14m", 128, 6, 4, 50304},      {"pythia-31m", 256, 6, 8, 50304},
    {"pythia-70m", 512, 6, 8, 50304},      {"pythia-160m", 768, 12, 12, 50304},
    {"pythia-410m", 1024, 24, 16, 50304},  {"pythia-1b", 2048, 16, 8, 50304},
    {"pythia-1.4b", 2048, 24, 16, 50304},  {"pythia-2.8b", 2560, 32, 32, 50304},
    {"pythia-6.9b", 4096, 32, 32, 50432},  {"pythia-12b", 5120, 36, 40, 50688},
    {"gpt-neox-20b", 6144, 44, 64, 50432},
};

inline const Shape* find_shape(std::string_view name) {
  const auto found = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape& shape) { return name == shape.name; });
  return found == std::end(kShapes) ? nullptr : found;
}

// Every tensor of a kind shares one host array; on the device each has its own place.
class SharedModel final : public Model {
 public:
  explicit SharedModel(const Shape& shape) {
    ModelConfig& c = config_;
    c.hidden_size = shape.hidden;
    c.num_layers = shape.layers;
    c.num_heads = shape.heads;
    c.head_dim = shape.hidden / shape.heads;
    c.intermediate_size = 4 * shape.hidden;
    c.vocab_size = shape.vocab;
    c.max_positions = 2048;
    c.rotary_dim = c.head_dim / 4;
    c.dtype = DType::float16;
    const std::int64_t most = std::max(c.vocab_size, 4 * c.hidden_size) * c.hidden_size;
    values_.resize(most);
    std::uint32_t state = 12345;
    const float scale = std::sqrt(3.0f / static_cast<float>(c.hidden_size));
    for (auto& value : values_) {
      state = state * 1664525u + 1013904223u;
      const __half half =
          __float2half_rn((static_cast<float>(state >> 8) / 8388608.0f - 1.0f) * scale);
      std::memcpy(&value, &half, 2);
    }
    const __half one = __float2half_rn(1.0f);
    ones_.resize(c.hidden_size);
    for (auto& value : ones_) std::memcpy(&value, &one, 2);
    const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
      return view(values_.data(), {rows, columns});
    };
    const auto vector = [&](std::int64_t count) { return view(values_.data(), {count}); };
    const auto ones = [&] { return view(ones_.data(), {c.hidden_size}); };
    weights_.embedding = matrix(c.vocab_size, c.hidden_size);
    weights_.lm_head = matrix(c.vocab_size, c.hidden_size);
    weights_.final_norm_weight = ones();
    weights_.final_norm_bias = vector(c.hidden_size);
    LayerWeights layer;
    for (const auto& [tensor, shape] : layer_tensors(c)) {
      const bool is_gain = shape.size() == 1 && !is_bias(tensor);
      layer[tensor] = is_gain ? ones() : view(values_.data(), shape);
    }
    weights_.layers.assign(c.num_layers, layer);
  }
  std::optional<std::string> find_non_finite() const override { return std::nullopt; }

 private:
  DLTensor view(void* data, std::vector<std::int64_t> shape) {
    shapes_.push_back(std::make_unique<std::vector<std::int64_t>>(std::move(shape)));
    auto& dims = *shapes_.back();
    return {data,
            {kDLCPU, 0},
            static_cast<int>(dims.size()),
            to_dl(DType::float16),
            dims.data(),
            nullptr,
            0};
  }
  std::vector<std::uint16_t> values_, ones_;
  std::vector<std::unique_ptr<std::vector<std::int64_t>>> shapes_;
};

}  // namespace clusterfusion::benchmark
