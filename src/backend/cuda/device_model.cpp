#include "backend/cuda/device_model.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <span>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/pinned_staging.hpp"
#include "backend/load/device_memory_need.hpp"
#include "backend/load/upload.hpp"
#include "base/fail.hpp"
#include "base/round_up.hpp"
#include "base/tensor_view.hpp"
#include "base/thread_pool.hpp"
#include "model/layer_tensors.hpp"
#include "plan/qkv_rows.hpp"
#include "plan/rotary_table.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr std::int64_t kAlignment = 256;
// Staging: 8 MiB of pinned memory a thread, 64 MiB at most. One thread reads mapped files at a
// quarter of what the bus takes or less.
constexpr std::int64_t kBufferBytes = 4 << 20;
constexpr int kMaxThreads = 8;
constexpr std::int64_t kBytesWorthAThread = 16 << 20;

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

// Elements of a tensor that follow each other.
struct Slice {
  const DLTensor& tensor;
  std::int64_t first, count;
};

Slice whole(const DLTensor& tensor) { return {tensor, 0, num_elements(tensor)}; }

// Lays tensors out one after another: first counts, then notes what goes where.
class Arena {
 public:
  explicit Arena(DType dtype) : dtype_(dtype) {}

  void begin_placing(char* base) {
    base_ = base;
    used_ = 0;
  }
  std::int64_t used() const noexcept { return used_; }
  const std::vector<UploadPart>& parts() const noexcept { return parts_; }

  // In the type of the layers' matrices, without gaps.
  const char* narrow(std::span<const Slice> slices) {
    const char* result = next();
    for (const Slice& slice : slices) {
      const DLTensor& tensor = slice.tensor;
      if (dtype_of(tensor) == dtype_)
        append(data_of(tensor) + slice.first * size_of(dtype_), slice.count * size_of(dtype_));
      else
        append_converted<std::uint16_t>(
            slice.count, [&](std::int64_t i) { return rounded(element(tensor, slice.first + i)); });
    }
    align();
    return result;
  }
  // Null if absent.
  const char* narrow(const DLTensor& tensor) {
    return is_present(tensor) ? narrow(std::array{whole(tensor)}) : nullptr;
  }

  // In float32, without gaps.
  const char* wide(std::span<const Slice> slices) {
    const char* result = next();
    for (const Slice& slice : slices)
      append_converted<float>(
          slice.count, [&](std::int64_t i) { return element(slice.tensor, slice.first + i); });
    align();
    return result;
  }

  // In float32.
  const char* zeros(std::int64_t count) {
    const char* result = next();
    append_converted<float>(count, [](std::int64_t) { return 0.0f; });
    align();
    return result;
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

  template <typename T, typename ValueAt>
  void append_converted(std::int64_t count, ValueAt value_at) {
    const auto bytes = count * static_cast<std::int64_t>(sizeof(T));
    if (!base_) return append(nullptr, bytes);
    std::vector<std::byte>& converted = converted_.emplace_back(bytes);
    for (std::int64_t i = 0; i < count; ++i) {
      const T value = value_at(i);
      std::memcpy(&converted[i * sizeof(T)], &value, sizeof(T));
    }
    append(converted.data(), bytes);
  }

  const char* next() const { return base_ ? base_ + used_ : nullptr; }
  void append(const std::byte* source, std::int64_t bytes) {
    if (base_) parts_.push_back({source, bytes, used_});
    used_ += bytes;
  }
  void align() { used_ = round_up(used_, kAlignment); }

  DType dtype_;
  char* base_ = nullptr;
  std::int64_t used_ = 0;
  std::vector<UploadPart> parts_;
  std::deque<std::vector<std::byte>> converted_;  // vectors, and embeddings of another type
};

// Biases of products are added to float32 sums; those of norms are read beside the weights.
bool is_wide(LayerTensor tensor) {
  return is_bias(tensor) && tensor != LayerTensor::input_norm_bias &&
         tensor != LayerTensor::post_norm_bias;
}

// Where a tensor on the device lies in the checkpoint.
std::vector<Slice> slices_of(LayerTensor tensor, const LayerSpec& spec, const LayerWeights& layer) {
  const bool is_qkv_bias = tensor == LayerTensor::qkv_bias;
  if (tensor != LayerTensor::qkv_weight && !is_qkv_bias) return {whole(layer[tensor])};
  const std::int64_t width = is_qkv_bias ? 1 : spec.hidden_size;
  std::vector<Slice> slices;
  for (const auto& [weight, first, count] : plan::qkv_rows(spec))
    slices.push_back({layer[is_qkv_bias ? bias_of(weight) : weight], first * width, count * width});
  return slices;
}

DeviceLayer place_layer(Arena& arena, const ModelConfig& config, const LayerWeights& layer) {
  DeviceLayer result;
  for (const auto& [tensor, shape] : layer_tensors(plan::with_gathered_qkv(config))) {
    const std::vector<Slice> slices = slices_of(tensor, config, layer);
    result.tensors[index_of(tensor)] = is_wide(tensor) ? arena.wide(slices) : arena.narrow(slices);
  }
  return result;
}

std::vector<float2> rotary_turns(const LayerSpec& spec, std::int64_t positions) {
  const plan::RotaryTable table(spec);
  std::vector<float2> turns;
  for (std::int64_t position = 0; position < positions; ++position)
    for (std::size_t pair = 0; pair < table.pairs(); ++pair) {
      const auto [cos, sin] = table.turn(position, pair);
      turns.push_back({cos, sin});
    }
  return turns;
}

// Waits until the values are there: cudaMemcpy may return when they have been staged, and the
// backend's streams wait for no other.
template <typename T>
DeviceMemory to_device(const std::vector<T>& values, const char* purpose) {
  DeviceMemory memory(static_cast<std::int64_t>(values.size() * sizeof(T)), purpose);
  if (values.empty()) return memory;
  check(cudaMemcpy(memory.as<>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "copying tables");
  check(cudaStreamSynchronize(cudaStreamLegacy), "copying tables");
  return memory;
}

void check_fit(std::int64_t weight_bytes, const DeviceModelOptions& options) {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  require_fit({.weight_bytes = weight_bytes,
               .workspace_bytes = workspace_bytes(static_cast<std::int64_t>(total)),
               .kv_page_bytes = options.kv_page_bytes,
               .positions = options.positions},
              static_cast<std::int64_t>(free), static_cast<std::int64_t>(total));
}

void copy_parts(const Model& model, const Arena& arena, char* to,
                const DeviceModelOptions& options) {
  const auto useful_threads = static_cast<int>(arena.used() / kBytesWorthAThread) + 1;
  const int threads = std::min({kMaxThreads, usable_cores(), useful_threads});
  PinnedStaging staging(to, threads * kBuffersPerThread, kBufferBytes);
  upload(arena.parts(), arena.used(), staging,
         {.threads = threads,
          .buffer_bytes = kBufferBytes,
          .progress = options.progress,
          .after_reading = [&](std::span<const std::byte> bytes) { model.release(bytes); }});
}

}  // namespace

DeviceModel::DeviceModel(const Model& model, const DeviceModelOptions& options) {
  const ModelConfig& config = model.config();
  const ModelWeights& weights = model.weights();
  require(config.dtype != DType::float32, ErrorKind::unsupported,
          "{}: the GPU backend streams float16 or bfloat16 weights, these are float32; convert the "
          "checkpoint (model.half().save_pretrained(...)) or use device \"cpu\"",
          model.folder().string());
  const std::vector<float2> turns = rotary_turns(config, options.positions);
  const auto turns_bytes = static_cast<std::int64_t>(turns.size() * sizeof(float2));
  Arena arena(config.dtype);
  layers_.resize(config.num_layers);
  for (const bool placing : {false, true}) {
    if (placing) {
      check_fit(arena.used() + turns_bytes, options);
      weights_ = DeviceMemory(arena.used(), "the weights");
      arena.begin_placing(weights_.as<>());
    }
    for (std::int64_t i = 0; i < config.num_layers; ++i) {
      layers_[i] = place_layer(arena, config, weights.layers[i]);
      const DLTensor& bias = weights.layers[i][LayerTensor::mlp_down_bias];
      const char* place =
          is_present(bias) ? arena.wide(std::array{whole(bias)}) : arena.zeros(config.hidden_size);
      if (i == 0) steered_biases_ = const_cast<char*>(place);  // into weights_, which is ours
    }
    embedding_ = arena.narrow(weights.embedding);
    lm_head_ =
        weights.lm_head.data == weights.embedding.data ? embedding_ : arena.narrow(weights.lm_head);
    final_norm_weight_ = arena.narrow(weights.final_norm_weight);
    final_norm_bias_ = arena.narrow(weights.final_norm_bias);
  }
  copy_parts(model, arena, weights_.as<>(), options);
  rotary_ = to_device(turns, "the rotary tables");
  reads_once_ = exceed_l2(model.bytes_per_token(), device_properties());
}

}  // namespace clusterfusion::cuda
