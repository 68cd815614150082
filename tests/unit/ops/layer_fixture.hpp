// A small decoder layer that owns its tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/tensor_view.hpp"
#include "clusterfusion/ops.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {

// widen() of all 16-bit values, for tensors of many.
inline const std::vector<float>& widened(DType dtype) {
  const auto all = [](DType type) {
    std::vector<float> values;
    for (int bits = 0; bits < 1 << 16; ++bits)
      values.push_back(widen(static_cast<std::uint16_t>(bits), type));
    return values;
  };
  static const std::vector<float> half = all(DType::float16), bfloat = all(DType::bfloat16);
  return dtype == DType::float16 ? half : bfloat;
}

// A row-major tensor at a multiple of 16 bytes (operator new gives that).
class OwnedTensor {
 public:
  OwnedTensor(DLDataType dtype, std::vector<std::int64_t> shape)
      : dtype_(dtype), shape_(std::move(shape)) {
    data_.resize(static_cast<std::size_t>(count() * dtype.bits / 8));
  }

  std::int64_t count() const {
    return std::accumulate(shape_.begin(), shape_.end(), std::int64_t{1}, std::multiplies<>());
  }
  DLTensor view() {
    DLTensor tensor{};
    tensor.data = data_.data();
    tensor.device = {kDLCPU, 0};
    tensor.ndim = static_cast<std::int32_t>(shape_.size());
    tensor.dtype = dtype_;
    tensor.shape = shape_.data();
    return tensor;
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.data());
  }
  const std::vector<std::byte>& bytes() const { return data_; }
  // Repeats the first `count` elements over the whole tensor.
  void repeat(std::int64_t count) {
    const std::size_t period = static_cast<std::size_t>(count * dtype_.bits / 8);
    for (std::size_t at = period; at < data_.size(); at += period)
      std::memcpy(data_.data() + at, data_.data(), std::min(period, data_.size() - at));
  }

  // Elements of a 16-bit or float32 tensor.
  double at(std::int64_t i) {
    if (dtype_.bits == 32) return as<float>()[i];
    return widened(dtype_.code == kDLBfloat ? DType::bfloat16
                                            : DType::float16)[as<std::uint16_t>()[i]];
  }
  void set(std::int64_t i, float value) {
    if (dtype_.bits == 32) {
      as<float>()[i] = value;
    } else {
      const DType dtype = dtype_.code == kDLBfloat ? DType::bfloat16 : DType::float16;
      as<std::uint16_t>()[i] = narrow(value, dtype);
    }
  }

 private:
  DLDataType dtype_;
  std::vector<std::int64_t> shape_;
  std::vector<std::byte> data_;
};

struct LayerSizes {
  std::int64_t hidden = 32;
  std::int64_t num_heads = 4;
  std::int64_t intermediate = 48;
  std::int64_t rotary_dim = 4;
  std::int64_t max_positions = 8;
  std::int64_t num_kv_heads = 0;  // 0: as many as num_heads

  std::int64_t head_dim() const { return hidden / num_heads; }
  std::int64_t kv_heads() const { return num_kv_heads == 0 ? num_heads : num_kv_heads; }
  std::int64_t kv_size() const { return kv_heads() * head_dim(); }
};

struct LayerFixture {
  explicit LayerFixture(LayerSizes sizes = {}, DType dtype = DType::float16, unsigned seed = 1)
      : sizes(sizes) {
    options.num_heads = sizes.num_heads;
    if (sizes.num_kv_heads != 0) options.num_kv_heads = sizes.num_kv_heads;
    const DLDataType narrow_type = to_dl(dtype);
    const DLDataType wide = {kDLFloat, 32, 1};
    const std::int64_t h = sizes.hidden;
    const std::int64_t inner = sizes.intermediate;
    std::mt19937 random(seed);
    const auto add = [&](const char* name, DLDataType type, std::vector<std::int64_t> shape,
                         float deviation, float mean = 0) {
      OwnedTensor tensor(type, std::move(shape));
      std::normal_distribution<float> normal(mean, deviation);
      // What is larger repeats itself: a prime number of elements, so that no two rows are the
      // same.
      const std::int64_t drawn = std::min<std::int64_t>(tensor.count(), 1048573);
      for (std::int64_t i = 0; i < drawn; ++i) tensor.set(i, normal(random));
      tensor.repeat(drawn);
      owned.emplace(name, std::move(tensor));
    };
    const float gain = 1.0f / std::sqrt(static_cast<float>(h));
    add("input", narrow_type, {1, h}, 1);
    add("weight_qkv", narrow_type, {h + 2 * sizes.kv_size(), h}, gain);
    add("bias_qkv", narrow_type, {h + 2 * sizes.kv_size()}, 0.2f);
    add("weight_o", narrow_type, {h, h}, gain);
    add("bias_o", narrow_type, {h}, 0.2f);
    add("k_cache", narrow_type, {sizes.max_positions, sizes.kv_size()}, 1);
    add("v_cache", narrow_type, {sizes.max_positions, sizes.kv_size()}, 1);
    add("ln_weight", narrow_type, {h}, 0.2f, 1);
    add("ln_bias", narrow_type, {h}, 0.1f);
    add("cos", wide, {sizes.rotary_dim}, 1);
    add("sin", wide, {sizes.rotary_dim}, 1);
    add("post_ln_weight", narrow_type, {h}, 0.2f, 1);
    add("post_ln_bias", narrow_type, {h}, 0.1f);
    add("mlp_up_weight", narrow_type, {inner, h}, gain);
    add("mlp_up_bias", narrow_type, {inner}, 0.2f);
    add("mlp_down_weight", narrow_type, {h, inner}, 1.0f / std::sqrt(static_cast<float>(inner)));
    add("mlp_down_bias", narrow_type, {h}, 0.2f);
    add("attn_output", narrow_type, {1, h}, 0);
    add("mlp_intermediate", narrow_type, {inner}, 0);
    add("output", narrow_type, {1, h}, 0);
    add("k_new", narrow_type, {1, sizes.kv_heads(), sizes.head_dim()}, 0);
    add("v_new", narrow_type, {1, sizes.kv_heads(), sizes.head_dim()}, 0);
    fill_views();
  }
  LayerFixture(const LayerFixture&) = delete;
  LayerFixture& operator=(const LayerFixture&) = delete;

  OwnedTensor& operator[](const char* name) { return owned.at(name); }

  // Views of the owned tensors, for a test to spoil.
  void fill_views() {
    const auto view = [&](const char* name) { return owned.at(name).view(); };
    tensors = {view("input"),        view("weight_qkv"),
               view("bias_qkv"),     view("weight_o"),
               view("bias_o"),       view("k_cache"),
               view("v_cache"),      view("ln_weight"),
               view("ln_bias"),      view("cos"),
               view("sin"),          view("post_ln_weight"),
               view("post_ln_bias"), view("mlp_up_weight"),
               view("mlp_up_bias"),  {sizes.max_positions - 1, {}}};
    down_weight = view("mlp_down_weight");
    down_bias = view("mlp_down_bias");
    attention = {view("attn_output"), view("mlp_intermediate"), view("k_new"), view("v_new")};
    layer = {view("output"), view("k_new"), view("v_new")};
    down = {view("input"), view("attn_output"), view("mlp_intermediate"), down_weight, down_bias};
    down_output = view("output");
  }

  void run_attention_mlp_up() { ops::attention_mlp_up(tensors, options, attention); }
  void run_mlp_down() { ops::mlp_down(down, down_output); }
  void run_decoder_layer(ops::DecoderLayerVariant variant = ops::DecoderLayerVariant::fused) {
    ops::decoder_layer(tensors, down_weight, down_bias, options, layer, variant);
  }

  LayerSizes sizes;
  std::map<std::string, OwnedTensor> owned;
  ops::LayerTensors tensors;
  ops::LayerOptions options;
  ops::AttentionMlpUpResults attention;
  ops::MlpDownTensors down;
  ops::DecoderLayerResults layer;
  DLTensor down_weight{}, down_bias{}, down_output{};
};

}  // namespace clusterfusion::test
