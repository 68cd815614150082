// A checkpoint's weights on the device, in the checkpoint's own layout and 16-bit type, streamed
// there from the mapped files.
#pragma once

#include <cstdint>
#include <functional>

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/memory.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// What a backend may take of a GPU's memory besides the weights and the KV cache, so that a model
// that will not fit is known before it is copied. tests/gpu/loading_test.cpp holds it to that.
inline constexpr std::int64_t kWorkspaceBytes = 300'000'000;

struct DeviceModelOptions {
  // For the check that one sequence fits beside the weights: its length, and a KV page's size.
  std::int64_t positions = 0;
  std::int64_t kv_page_bytes = 0;
  std::function<void(std::int64_t done, std::int64_t total)> progress = {};
};

class DeviceModel {
 public:
  // Copies everything; the matrices must be float16 or bfloat16. Norm parameters become the
  // matrices' type, biases float32, absent biases zero.
  // Errors: unsupported (dtype); out_of_memory before anything is copied.
  DeviceModel(const Model& model, const DeviceModelOptions& options);

  const StreamedLayer* layers() const noexcept { return layers_.as<StreamedLayer>(); }
  // The first layer, and the bytes from each pointer of a layer to the same one of the next.
  const StreamedLayer& first_layer() const noexcept { return first_layer_; }
  std::int64_t layer_stride() const noexcept { return layer_stride_; }
  const char* embedding() const noexcept { return embedding_; }
  const char* lm_head() const noexcept { return lm_head_; }
  const void* final_norm_weight() const noexcept { return final_norm_weight_; }
  const void* final_norm_bias() const noexcept { return final_norm_bias_; }
  // Cosines and sines, [positions, rotary_dim / 2].
  const float2* rotary() const noexcept { return rotary_.as<float2>(); }
  // All weights lie in one block.
  const DeviceMemory& weights() const noexcept { return weights_; }

 private:
  DeviceMemory weights_, layers_, rotary_;
  StreamedLayer first_layer_{};
  std::int64_t layer_stride_ = 0;
  const char* embedding_ = nullptr;
  const char* lm_head_ = nullptr;
  const void* final_norm_weight_ = nullptr;
  const void* final_norm_bias_ = nullptr;
};

}  // namespace clusterfusion::cuda
