// A model whose keys and queries have large biases, as Qwen2's have: scores are then differences of
// large numbers, which 16-bit keys do not hold.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/tensor_view.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::test {

// Another model, whose biases of queries and keys (float32) are made as long as `norm` in each
// head.
class LargeBiasModel final : public Model {
 public:
  LargeBiasModel(std::shared_ptr<const Model> source, double norm) : source_(std::move(source)) {
    config_ = source_->config();
    weights_ = source_->weights();
    folder_ = source_->folder();
    for (LayerWeights& layer : weights_.layers) {
      const auto parts = static_cast<std::size_t>(config_.heads_per_kv_head()) + 2;
      // Of each head of keys and values: its queries, its key, its value.
      lengthen(layer[LayerTensor::qkv_bias], norm,
               [&](std::size_t head) { return head % parts + 1 < parts; });
      const auto every = [](std::size_t) { return true; };
      lengthen(layer[LayerTensor::query_bias], norm, every);
      lengthen(layer[LayerTensor::key_bias], norm, every);
    }
  }

  std::optional<std::string> find_non_finite() const override { return source_->find_non_finite(); }

 private:
  template <typename Chosen>
  void lengthen(DLTensor& bias, double norm, Chosen&& chosen) {
    if (!is_present(bias)) return;
    const auto dim = static_cast<std::size_t>(config_.head_dim);
    auto& values = storage_.emplace_back(static_cast<std::size_t>(bias.shape[0]));
    std::memcpy(values.data(), data_of(bias), values.size() * sizeof(float));
    for (std::size_t head = 0; head < values.size() / dim; ++head) {
      if (!chosen(head)) continue;
      double squares = 0;
      for (std::size_t i = 0; i < dim; ++i) squares += std::pow(values[head * dim + i], 2);
      for (std::size_t i = 0; i < dim; ++i)
        values[head * dim + i] *= static_cast<float>(norm / std::sqrt(squares));
    }
    bias.data = values.data();
    bias.byte_offset = 0;
  }

  std::shared_ptr<const Model> source_;
  std::deque<std::vector<float>> storage_;
};

}  // namespace clusterfusion::test
