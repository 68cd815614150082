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

// Before the first test; without a GPU all are skipped.
class SchedulesOnGpu : public testing::Environment {
 public:
  void SetUp() override {
    if (const std::string reason = cuda_unavailable_reason(); !reason.empty())
      GTEST_SKIP() << reason;
    schedule_device() = {
        .make_backend =
            [](std::shared_ptr<const Model> model, BackendOptions options) {
              options.mode = DecodeMode::throughput;
              return make_cuda_backend(std::move(model), options);
            },
        .model = streamed_config(),
        .knows_llama = false,
    };
  }
};

const testing::Environment* const kEnvironment =
    testing::AddGlobalTestEnvironment(new SchedulesOnGpu);

}  // namespace
}  // namespace clusterfusion::test
