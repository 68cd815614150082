// A checkpoint's weights on the device, in the checkpoint's own layout and 16-bit type, streamed
// there from the mapped files. Separate matrices of queries, keys and values become one on the way,
// with its rows by KV head.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/memory.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// Of the memory of a GPU that has `device_bytes`, what the activations of prompts may take.
constexpr std::int64_t prefill_budget(std::int64_t device_bytes) {
  return std::clamp<std::int64_t>(device_bytes / 200, 180'000'000, 640'000'000);
}
// What a backend may take besides the weights and the KV cache, so that a model that will not fit
// is known before it is copied. tests/gpu/loading_test.cpp holds it to that.
constexpr std::int64_t workspace_bytes(std::int64_t device_bytes) {
  return prefill_budget(device_bytes) + 120'000'000;
}

struct DeviceModelOptions {
  // Of the longest sequence. The rotary table has as many, and such a sequence must fit beside the
  // weights, with pages of this size.
  std::int64_t positions = 0;
  std::int64_t kv_page_bytes = 0;
  std::function<void(std::int64_t done, std::int64_t total)> progress = {};
};

// A layer's tensors, by LayerTensor, of plan::with_gathered_qkv(); null where the layer has none.
struct DeviceLayer {
  std::array<const char*, kNumLayerTensors> tensors{};

  const char* operator[](LayerTensor tensor) const noexcept { return tensors[index_of(tensor)]; }
};

class DeviceModel {
 public:
  // Copies everything; the matrices must be float16 or bfloat16. Norm parameters become the
  // matrices' type, other biases float32, absent tensors null.
  // Errors: unsupported (dtype); out_of_memory before anything is copied.
  DeviceModel(const Model& model, const DeviceModelOptions& options);

  const std::vector<DeviceLayer>& layers() const noexcept { return layers_; }
  // Bytes from each pointer of a layer to the same one of the next: all layers have the same
  // shapes, so they lie one after another at one distance.
  std::int64_t layer_stride() const noexcept {
    constexpr LayerTensor kAny = LayerTensor::qkv_weight;
    return layers_.size() > 1 ? layers_[1][kAny] - layers_[0][kAny] : 0;
  }
  // The first layer, as the streaming kernels are told of it.
  StreamedLayer first_streamed_layer() const {
    return streamed_layer([this](LayerTensor tensor) { return layers_.front()[tensor]; });
  }
  // A second place for the biases of the second MLP matrix in each layer: for layer 0; the others'
  // lie layer_stride() further. Holds the model's own, or zeros, at first; decode steps that steer
  // write there (interventions/device_interventions.hpp).
  char* steered_biases() const noexcept { return steered_biases_; }
  const char* embedding() const noexcept { return embedding_; }
  const char* lm_head() const noexcept { return lm_head_; }
  const void* final_norm_weight() const noexcept { return final_norm_weight_; }
  // Null if the model's norms have none.
  const void* final_norm_bias() const noexcept { return final_norm_bias_; }
  // Cosines and sines, [positions, rotary_dim / 2].
  const float2* rotary() const noexcept { return rotary_.as<float2>(); }
  // Points a streaming kernel's parameters at all of that.
  template <typename Params>
  void tell(Params& params) const {
    params.first_layer = first_streamed_layer();
    params.layer_stride = layer_stride();
    params.embedding = embedding();
    params.lm_head_weight = lm_head();
    params.final_norm_weight = final_norm_weight();
    params.final_norm_bias = final_norm_bias();
    params.rotary = rotary();
    params.reads_once = reads_once_;
  }
  // All weights lie in one block.
  const DeviceMemory& weights() const noexcept { return weights_; }

 private:
  DeviceMemory weights_, rotary_;
  bool reads_once_ = false;  // of a token's weights: there are more than L2 holds
  std::vector<DeviceLayer> layers_;
  char* steered_biases_ = nullptr;
  const char* embedding_ = nullptr;
  const char* lm_head_ = nullptr;
  const void* final_norm_weight_ = nullptr;
  const void* final_norm_bias_ = nullptr;
};

}  // namespace clusterfusion::cuda
