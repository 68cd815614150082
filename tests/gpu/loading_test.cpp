// What arrives on the GPU, what it takes there, and what happens where it does not fit.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "backend/cuda/device_model.hpp"
#include "base/tensor_view.hpp"
#include "clusterfusion/error.hpp"
#include "gpu_fixture.hpp"
#include "support/gathered_model.hpp"
#include "support/grouped_checkpoint.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

using cuda::DeviceLayer;
using cuda::DeviceMemory;
using cuda::DeviceModel;

class Loading : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    ASSERT_EQ(cudaFree(nullptr), cudaSuccess);  // makes the context, which is not ours to count
  }
};

// What streams and events may make the driver keep for itself.
constexpr std::int64_t kDriverBytes = 32 << 20;

std::int64_t free_bytes() {
  std::size_t free = 0, total = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  return static_cast<std::int64_t>(free);
}

std::int64_t total_bytes() {
  std::size_t free = 0, total = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  return static_cast<std::int64_t>(total);
}

template <typename T>
std::vector<T> fetch(const void* from, std::int64_t count) {
  std::vector<T> values(count);
  EXPECT_EQ(cudaMemcpy(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost),
            cudaSuccess);
  return values;
}

// What a tensor must be on the device, in the matrices' type or in float32.
std::vector<float> values_of(const DLTensor& tensor, std::int64_t count) {
  std::vector<float> values(count);
  const DType dtype = *dtype_of(tensor);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::byte* element = data_of(tensor) + i * size_of(dtype);
    if (dtype == DType::float32) {
      std::memcpy(&values[i], element, 4);
    } else {
      std::uint16_t bits;
      std::memcpy(&bits, element, 2);
      values[i] = widen(bits, dtype);
    }
  }
  return values;
}

void expect_matrix(const void* found, const DLTensor& expected, const char* name) {
  const auto bytes = fetch<std::byte>(found, num_bytes(expected));
  EXPECT_EQ(std::memcmp(bytes.data(), data_of(expected), bytes.size()), 0) << name;
}

void expect_norm(const void* found, const DLTensor& expected, DType dtype, const char* name) {
  const std::int64_t count = num_elements(expected);
  const auto bits = fetch<std::uint16_t>(found, count);
  const auto values = values_of(expected, count);
  for (std::int64_t i = 0; i < count; ++i)
    ASSERT_EQ(bits[i], narrow(values[i], dtype)) << name << " [" << i << "]";
}

void expect_bias(const void* found, const DLTensor& expected, const char* name) {
  const std::int64_t count = num_elements(expected);
  EXPECT_EQ(fetch<float>(found, count), values_of(expected, count)) << name;
}

// Biases of products become float32, those of norms have the norms' type.
void expect_layer(const DeviceLayer& found, const LayerWeights& expected, DType dtype) {
  for (std::size_t i = 0; i < kNumLayerTensors; ++i) {
    const auto tensor = static_cast<LayerTensor>(i);
    const std::string name = "tensor " + std::to_string(i);
    ASSERT_EQ(found[tensor] != nullptr, is_present(expected[tensor])) << name;
    if (found[tensor] == nullptr) continue;
    if (expected[tensor].ndim == 2)
      expect_matrix(found[tensor], expected[tensor], name.c_str());
    else if (!is_bias(tensor) || tensor == LayerTensor::input_norm_bias ||
             tensor == LayerTensor::post_norm_bias)
      expect_norm(found[tensor], expected[tensor], dtype, name.c_str());
    else
      expect_bias(found[tensor], expected[tensor], name.c_str());
  }
}

void expect_same(const Model& model, const DeviceModel& device) {
  const ModelConfig& config = model.config();
  const ModelWeights& weights = model.weights();
  const std::vector<DeviceLayer>& layers = device.layers();
  ASSERT_EQ(static_cast<std::int64_t>(layers.size()), config.num_layers);
  for (std::int64_t i = 0; i < config.num_layers; ++i) {
    SCOPED_TRACE("layer " + std::to_string(i));
    expect_layer(layers[i], weights.layers[i], config.dtype);
  }
  expect_matrix(device.embedding(), weights.embedding, "embedding");
  expect_matrix(device.lm_head(), weights.lm_head, "lm_head");
  expect_norm(device.final_norm_weight(), weights.final_norm_weight, config.dtype, "final.weight");
  ASSERT_EQ(device.final_norm_bias() != nullptr, is_present(weights.final_norm_bias));
  if (is_present(weights.final_norm_bias))
    expect_norm(device.final_norm_bias(), weights.final_norm_bias, config.dtype, "final.bias");
}

TEST_F(Loading, BringsEveryByteOfRandomModels) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const DType vector_dtype : {DType::float32, dtype}) {
      for (const bool large : {false, true}) {
        SCOPED_TRACE(std::string(name_of(dtype)) + ", vectors " + name_of(vector_dtype));
        ModelConfig config = small_config();
        config.dtype = dtype;
        config.vocab_size = large ? 50304 : 301;  // the large one takes many buffers
        if (large) config.hidden_size = 512, config.intermediate_size = 2048, config.num_heads = 8;
        config.head_dim = config.hidden_size / config.num_heads;
        config.tied_embeddings = !large;
        const auto model = make_random_model(config, {.seed = 3, .vector_dtype = vector_dtype});
        const DeviceModel device(*model, {.positions = 64, .kv_page_bytes = 1 << 20});
        expect_same(*model, device);
      }
    }
  }
}

TEST_F(Loading, BringsEveryByteOfMappedFiles) {
  const std::filesystem::path root = CF_SOURCE_DIR;
  for (const char* folder :
       {"models/demo", "tests/unit/model/data/checkpoints/no_attention_bias_float16",
        "tests/unit/model/data/checkpoints/sharded_bfloat16",
        "tests/unit/model/data/checkpoints/tied_float16"}) {
    SCOPED_TRACE(folder);
    const auto model = Model::open(root / folder);
    std::vector<std::int64_t> seen;
    const DeviceModel device(*model, {.positions = 64,
                                      .kv_page_bytes = 1 << 20,
                                      .progress = [&](std::int64_t done, std::int64_t total) {
                                        seen.push_back(done);
                                        EXPECT_LE(done, total);
                                      }});
    expect_same(*model, device);
    EXPECT_EQ(seen.front(), 0);
    EXPECT_EQ(seen.back(), device.weights().bytes());
    EXPECT_TRUE(std::ranges::is_sorted(seen));
  }
}

// Of a random model, and of the same one in a mapped file.
TEST_F(Loading, GathersLlamasMatrices) {
  for (const DType vector_dtype : {DType::float32, DType::bfloat16}) {
    for (const bool large : {false, true}) {
      ModelConfig config = small_llama_config();
      config.hidden_size = large ? 1024 : 96;
      if (large) config.head_dim = config.rotary_dim = 128;
      config.tied_embeddings = !large;
      const auto model = make_random_model(config, {.seed = 4, .vector_dtype = vector_dtype});
      const DeviceModel device(*model, {.positions = 64, .kv_page_bytes = 1 << 20});
      expect_same(GatheredModel(model), device);
    }
  }
  const auto model = open_qwen2_model();
  const DeviceModel device(*model, {.positions = 64, .kv_page_bytes = 1 << 20});
  expect_same(GatheredModel(model), device);
}

// As wide as a Pythia model, with fewer layers.
std::shared_ptr<const Model> wide_model(std::int64_t hidden, std::int64_t heads) {
  ModelConfig config = small_config();
  config.dtype = DType::float16;
  config.hidden_size = hidden;
  config.num_heads = heads;
  config.head_dim = hidden / heads;
  config.rotary_dim = config.head_dim / 4;
  config.intermediate_size = 4 * hidden;
  config.num_layers = 1;
  config.vocab_size = 50688;
  config.max_positions = 2048;
  return make_random_model(config);
}

// As wide as Llama-3.2-1B, with its context and vocabulary, and one layer.
std::shared_ptr<const Model> wide_llama_model() {
  ModelConfig config = small_llama_config();
  config.qk_norm = config.attention_bias = false;
  config.hidden_size = 2048;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = config.rotary_dim = 64;
  config.intermediate_size = 8192;
  config.num_layers = 1;
  config.vocab_size = 128256;
  config.max_positions = 131072;
  return make_random_model(config);
}

// Of what is there besides weights, rotary table and KV cache.
void expect_at_most_the_workspace(const std::shared_ptr<const Model>& model,
                                  const BackendOptions& options = {}) {
  const ModelConfig& config = model->config();
  SCOPED_TRACE("hidden size " + std::to_string(config.hidden_size));
  const std::int64_t before = free_bytes();
  const auto start = std::chrono::steady_clock::now();
  const auto backend = make_cuda_backend(model, options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const SequenceId id = backend->create_sequence({});
  backend->reserve(id, 2048);
  // Everything that is allocated as late as at its first use.
  std::vector<TokenId> prompt(2000);
  for (std::size_t i = 0; i < prompt.size(); ++i)
    prompt[i] = static_cast<TokenId>(i * 7919 % 50000);
  SampledToken sampled;
  PrefillOutput output;
  output.sampled = &sampled;
  for (std::span<const TokenId> rest = prompt; !rest.empty();) {
    const std::size_t count = std::min<std::size_t>(backend->info().prefill_chunk, rest.size());
    backend->prefill(id, rest.first(count), output);
    rest = rest.subspan(count);
  }
  std::vector<SampledToken> next(backend->info().decode_ahead);
  backend->decode({&id, 1}, {&sampled.token, 1}, backend->info().decode_ahead, next, {});
  const std::int64_t taken = before - free_bytes();
  const std::int64_t cache = 2048 * backend->info().kv_bytes_per_position;
  const std::int64_t turns = config.max_positions * config.rotary_dim / 2 * 8;
  const std::int64_t rest = taken - model->total_bytes() - turns - cache;
  std::printf(
      "hidden size %d: opened in %.3f s, %.2f GB/s; takes %.1f MB: weights %.1f, KV cache "
      "%.1f, all else %.1f\n",
      static_cast<int>(config.hidden_size), seconds.count(),
      model->total_bytes() * 1e-9 / seconds.count(), taken * 1e-6, model->total_bytes() * 1e-6,
      cache * 1e-6, rest * 1e-6);
  EXPECT_LE(rest, cuda::workspace_bytes(total_bytes()));
}

TEST_F(Loading, TakesWeightsKvCacheAndAtMostTheWorkspace) {
  for (const auto& [hidden, heads] : {std::pair{2560, 32}, std::pair{5120, 40}})
    expect_at_most_the_workspace(wide_model(hidden, heads));
}

TEST_F(Loading, TakesOfALlamaModelAtMostTheWorkspace) {
  expect_at_most_the_workspace(wide_llama_model());
}

TEST_F(Loading, TakesWithAFloat32CacheAtMostTheWorkspace) {
  BackendOptions options;
  options.kv_dtype = DType::float32;
  expect_at_most_the_workspace(wide_model(5120, 40), options);
  expect_at_most_the_workspace(wide_llama_model(), options);
}

TEST_F(Loading, SaysWhatIsNeededBeforeItCopies) {
  const auto model = wide_model(1024, 16);
  bool copied = false;
  BackendOptions options;
  options.load_progress = [&](std::int64_t, std::int64_t) { copied = true; };
  // Another program that has taken nearly everything.
  const DeviceMemory other(free_bytes() - 400'000'000, "another program");
  const std::int64_t before = free_bytes();
  try {
    make_cuda_backend(model, options);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::out_of_memory);
    EXPECT_THAT(error.what(), ::testing::MatchesRegex(
                                  "the model does not fit into the GPU's memory: .* GB of "
                                  "weights, 0.* GB of workspace and .* GB of KV cache for one "
                                  "sequence of 2048 positions make .* GB, and 0.* of .* GB are "
                                  "free; close other programs on this GPU, .*"));
    std::printf("%s\n", error.what());
  }
  EXPECT_FALSE(copied);
  EXPECT_GE(free_bytes(), before - kDriverBytes);
}

TEST_F(Loading, EndsWhereItsProgressThrows) {
  const auto model = wide_model(1024, 16);
  const std::int64_t before = free_bytes();
  BackendOptions options;
  options.load_progress = [](std::int64_t done, std::int64_t total) {
    if (done > total / 2) throw Error(ErrorKind::invalid_argument, "enough");
  };
  EXPECT_THAT([&] { make_cuda_backend(model, options); },
              ::testing::ThrowsMessage<Error>("enough"));
  EXPECT_GE(free_bytes(), before - kDriverBytes) << "everything was given back";
}

}  // namespace
}  // namespace clusterfusion::test
