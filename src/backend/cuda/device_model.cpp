#include "backend/cuda/device_model.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <numbers>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"
#include "base/tensor_view.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr std::int64_t kAlignment = 256;

float element(const DLTensor& tensor, std::int64_t index) {
  const std::byte* data = data_of(tensor);
  switch (*dtype_of(tensor)) {
    case DType::float16: return __half2float(reinterpret_cast<const __half*>(data)[index]);
    case DType::bfloat16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(data)[index]);
    case DType::float32: break;
  }
  return reinterpret_cast<const float*>(data)[index];
}

// Lays tensors out one after another: first counts, then copies.
class Arena {
 public:
  explicit Arena(DType dtype) : dtype_(dtype) {}

  void begin_copying(char* base) {
    base_ = base;
    used_ = 0;
  }
  std::int64_t used() const noexcept { return used_; }

  const char* matrix(const DLTensor& tensor) { return place(data_of(tensor), num_bytes(tensor)); }

  // A norm parameter, in the matrices' type.
  const char* norm(const DLTensor& tensor) {
    if (dtype_of(tensor) == dtype_) return matrix(tensor);
    const std::int64_t count = num_elements(tensor);
    std::vector<std::uint16_t> values(count);
    for (std::int64_t i = 0; base_ && i < count; ++i) values[i] = rounded(element(tensor, i));
    return place(values.data(), count * 2);
  }

  // A bias in float32; zeros if absent.
  const float* bias(const DLTensor& tensor, std::int64_t count) {
    std::vector<float> values(count);
    for (std::int64_t i = 0; base_ && is_present(tensor) && i < count; ++i)
      values[i] = element(tensor, i);
    return reinterpret_cast<const float*>(place(values.data(), count * 4));
  }

 private:
  std::uint16_t rounded(float value) const {
    std::uint16_t bits;
    if (dtype_ == DType::float16) {
      const __half half = __float2half_rn(value);
      std::memcpy(&bits, &half, 2);
    } else {
      const __nv_bfloat16 half = __float2bfloat16_rn(value);
      std::memcpy(&bits, &half, 2);
    }
    return bits;
  }

  const char* place(const void* source, std::int64_t bytes) {
    const char* result = base_ ? base_ + used_ : nullptr;
    if (base_)
      check(cudaMemcpy(base_ + used_, source, bytes, cudaMemcpyHostToDevice), "copying weights");
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return result;
  }

  DType dtype_;
  char* base_ = nullptr;
  std::int64_t used_ = 0;
};

StreamedLayer place_layer(Arena& arena, const LayerWeights& layer, const ModelConfig& config) {
  const std::int64_t hidden = config.hidden_size;
  StreamedLayer result;
  result.qkv = arena.matrix(layer.qkv_weight);
  result.mlp_up = arena.matrix(layer.mlp_up_weight);
  result.mlp_down = arena.matrix(layer.mlp_down_weight);
  result.attention_out = arena.matrix(layer.attention_out_weight);
  result.input_norm_weight = arena.norm(layer.input_norm_weight);
  result.input_norm_bias = arena.norm(layer.input_norm_bias);
  result.post_norm_weight = arena.norm(layer.post_norm_weight);
  result.post_norm_bias = arena.norm(layer.post_norm_bias);
  result.qkv_bias = arena.bias(layer.qkv_bias, 3 * hidden);
  result.attention_out_bias = arena.bias(layer.attention_out_bias, hidden);
  result.mlp_up_bias = arena.bias(layer.mlp_up_bias, config.intermediate_size);
  result.mlp_down_bias = arena.bias(layer.mlp_down_bias, hidden);
  return result;
}

// As transformers computes them: inverse frequencies in float32, angles as their float32 product
// with the position.
std::vector<float2> rotary_table(const ModelConfig& config) {
  const std::int64_t half = config.rotary_dim / 2;
  std::vector<float2> table(config.max_positions * half);
  for (std::int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.rotary_dim);
    const float frequency = 1.0f / static_cast<float>(std::pow(config.rope_theta, exponent));
    for (std::int64_t position = 0; position < config.max_positions; ++position) {
      const float angle = static_cast<float>(position) * frequency;
      table[position * half + i] = {std::cos(angle), std::sin(angle)};
    }
  }
  return table;
}

template <typename T>
DeviceMemory to_device(const std::vector<T>& values, const char* purpose) {
  DeviceMemory memory(static_cast<std::int64_t>(values.size() * sizeof(T)), purpose);
  if (!values.empty())
    check(
        cudaMemcpy(memory.as<>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "copying tables");
  return memory;
}

}  // namespace

DeviceModel::DeviceModel(const Model& model) {
  const ModelConfig& config = model.config();
  const ModelWeights& weights = model.weights();
  require(config.dtype != DType::float32, ErrorKind::unsupported,
          "{}: the GPU backend streams float16 or bfloat16 weights, these are float32; convert the "
          "checkpoint (model.half().save_pretrained(...)) or use device \"cpu\"",
          model.folder().string());
  Arena arena(config.dtype);
  std::vector<StreamedLayer> layers(config.num_layers);
  for (const bool copy : {false, true}) {
    if (copy) {
      weights_ = DeviceMemory(arena.used(), "the weights");
      arena.begin_copying(weights_.as<>());
    }
    for (std::int64_t i = 0; i < config.num_layers; ++i)
      layers[i] = place_layer(arena, weights.layers[i], config);
    embedding_ = arena.matrix(weights.embedding);
    lm_head_ =
        weights.lm_head.data == weights.embedding.data ? embedding_ : arena.matrix(weights.lm_head);
    final_norm_weight_ = arena.norm(weights.final_norm_weight);
    final_norm_bias_ = arena.norm(weights.final_norm_bias);
  }
  layers_ = to_device(layers, "the list of layers");
  rotary_ = to_device(rotary_table(config), "the rotary tables");
}

}  // namespace clusterfusion::cuda
