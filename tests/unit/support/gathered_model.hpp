// A model whose layers have one QKV matrix, put together from another model's three.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/tensor_view.hpp"
#include "plan/qkv_rows.hpp"

namespace clusterfusion::test {

class GatheredModel final : public Model {
 public:
  explicit GatheredModel(std::shared_ptr<const Model> source) : source_(std::move(source)) {
    config_ = plan::with_gathered_qkv(source_->config());
    weights_ = source_->weights();
    folder_ = source_->folder();
    for (LayerWeights& layer : weights_.layers) {
      const LayerWeights separate = layer;
      layer[LayerTensor::qkv_weight] = gathered(separate, false);
      if (is_present(separate[LayerTensor::query_bias]))
        layer[LayerTensor::qkv_bias] = gathered(separate, true);
      for (const LayerTensor tensor :
           {LayerTensor::query_weight, LayerTensor::key_weight, LayerTensor::value_weight})
        layer[tensor] = layer[bias_of(tensor)] = DLTensor{};
    }
  }

  std::optional<std::string> find_non_finite() const override { return source_->find_non_finite(); }

 private:
  struct Storage {
    std::vector<std::byte> data;
    std::array<std::int64_t, 2> shape;
  };

  DLTensor gathered(const LayerWeights& layer, bool of_biases) {
    Storage& storage = storage_.emplace_back();
    DLTensor view = layer[of_biases ? LayerTensor::query_bias : LayerTensor::query_weight];
    const std::int64_t row_bytes = num_bytes(view) / view.shape[0];
    for (const auto& [weight, first, count] : plan::qkv_rows(source_->config())) {
      const std::byte* from =
          data_of(layer[of_biases ? bias_of(weight) : weight]) + first * row_bytes;
      storage.data.insert(storage.data.end(), from, from + count * row_bytes);
    }
    storage.shape = {config_.qkv_size(), of_biases ? 0 : view.shape[1]};
    view.data = storage.data.data();
    view.byte_offset = 0;
    view.shape = storage.shape.data();
    return view;
  }

  std::shared_ptr<const Model> source_;
  std::deque<Storage> storage_;
};

}  // namespace clusterfusion::test
