// Memory that nobody wrote is NaN, and no result shows it.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "backend/cuda/kv_pool.hpp"
#include "backend/cuda/memory.hpp"
#include "gpu_fixture.hpp"

namespace clusterfusion::test {
namespace {

// Sets CLUSTERFUSION_POISON while it lives.
class PoisonSetting {
 public:
  explicit PoisonSetting(const char* value) {
    if (const char* before = std::getenv(kName)) before_ = before;
    setenv(kName, value, 1);
  }
  ~PoisonSetting() { before_.empty() ? unsetenv(kName) : setenv(kName, before_.c_str(), 1); }
  PoisonSetting(const PoisonSetting&) = delete;
  PoisonSetting& operator=(const PoisonSetting&) = delete;

 private:
  static constexpr const char* kName = "CLUSTERFUSION_POISON";
  std::string before_;
};

bool is_poisoned(const char* data, std::size_t bytes) {
  std::vector<unsigned char> copy(bytes);
  if (cudaMemcpy(copy.data(), data, bytes, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
  return std::all_of(copy.begin(), copy.end(), [](unsigned char byte) { return byte == 0xFF; });
}

class PoisonedMemory : public GpuTest {};

TEST_F(PoisonedMemory, IsNewMemoryAndEachPageAnew) {
  const PoisonSetting on("1");
  constexpr std::int64_t kBytes = 4096;
  const cuda::DeviceMemory memory(kBytes, "a test");
  EXPECT_TRUE(is_poisoned(memory.as<>(), kBytes));
  cuda::KvPool pool(kBytes);
  char* page = pool.take();
  EXPECT_TRUE(is_poisoned(page, kBytes));
  ASSERT_EQ(cudaMemset(page, 0, kBytes), cudaSuccess);
  EXPECT_FALSE(is_poisoned(page, kBytes));
  pool.give_back(page);
  ASSERT_EQ(pool.take(), page);
  EXPECT_TRUE(is_poisoned(page, kBytes));
}

// Everything that a user can get: logits of prefill and decode at lengths about a page's end, and
// tokens of several sequences that come and go.
std::vector<float> results_of(const std::shared_ptr<const Model>& model,
                              const BackendOptions& options) {
  const std::int64_t vocab = model->config().vocab_size;
  const auto backend = make_cuda_backend(model, options);
  std::vector<float> results;
  const auto keep = [&](const auto& values) {
    results.insert(results.end(), values.begin(), values.end());
  };
  for (const int length : {1, 2, 63, 64, 65, 130}) {
    const auto tokens = random_tokens(vocab, length, static_cast<unsigned>(length));
    keep(all_logits(*backend, vocab, tokens));
    keep(decoded_logits(*backend, vocab, tokens));
    SamplingParams sampling;
    sampling.temperature = length % 2 == 0 ? 0.0f : 0.8f;
    const SequenceId id = backend->create_sequence(sampling);
    backend->prefill(id, tokens, {});
    std::vector<SampledToken> sampled(12);
    backend->decode(std::vector{id}, std::vector{tokens[0]}, 12, sampled, {});
    for (const SampledToken& token : sampled) results.push_back(static_cast<float>(token.token));
    backend->release_sequence(id);
    // The third prompt of this length: now a graph that is there already.
    keep(all_logits(*backend, vocab, tokens));
  }
  return results;
}

class Poison : public GpuTest, public testing::WithParamInterface<Shape> {};

void expect_no_poison(const Shape& shape, const BackendOptions& options) {
  const auto model = make_random_model(config_of(shape));
  std::vector<float> clean, poisoned;
  {
    const PoisonSetting off("0");
    clean = results_of(model, options);
  }
  {
    const PoisonSetting on("1");
    poisoned = results_of(model, options);
  }
  EXPECT_TRUE(clean == poisoned);
}

TEST_P(Poison, NeverShows) { expect_no_poison(GetParam(), {}); }

TEST_F(PoisonedMemory, NeverShowsInAFloat32Cache) {
  BackendOptions options;
  options.kv_dtype = DType::float32;
  for (const std::int64_t heads : {8, 2})
    expect_no_poison({"tiny", 384, heads, 512, 2, 301, 8}, options);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Poison, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
