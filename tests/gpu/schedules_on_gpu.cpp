// Has the engine's random schedules and drafted texts run on a GPU, on a small model that streams
// (mode throughput). CLUSTERFUSION_SCHEDULES and CLUSTERFUSION_DRAFTED_REQUESTS say how many.
#include <gtest/gtest.h>

#include <string>

#include "backend/cuda/cuda_backend.hpp"
#include "engine/random_requests.hpp"

namespace clusterfusion::test {
namespace {

ModelConfig streamed_config() {
  ModelConfig config = small_config();
  config.hidden_size = 128;
  config.num_heads = 4;
  config.head_dim = 32;
  config.intermediate_size = 512;
  config.rotary_dim = 8;
  return config;
}

// Sizes that a GPU computes, though no kernel streams them.
ModelConfig llama_config() {
  ModelConfig config = small_llama_config();
  config.hidden_size = 96;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = config.rotary_dim = 32;
  config.intermediate_size = 256;
  config.dtype = DType::float16;
  return config;
}

class SchedulesOnGpu : public testing::EmptyTestEventListener {
 public:
  void OnTestProgramStart(const testing::UnitTest&) override {
    if (!reason_.empty()) return;
    schedule_device() = {
        .make_backend =
            [](std::shared_ptr<const Model> model, BackendOptions options) {
              options.mode = DecodeMode::throughput;
              return make_cuda_backend(std::move(model), options);
            },
        .model = streamed_config(),
        .llama = llama_config(),
    };
  }
  void OnTestStart(const testing::TestInfo&) override {
    if (!reason_.empty()) GTEST_SKIP() << reason_;
  }

 private:
  const std::string reason_ = cuda_unavailable_reason();
};

}  // namespace
}  // namespace clusterfusion::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new clusterfusion::test::SchedulesOnGpu);
  return RUN_ALL_TESTS();
}
