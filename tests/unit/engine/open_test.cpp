#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "engine/choose_device.hpp"
#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using testing::HasSubstr;

const std::filesystem::path kCheckpoints = CF_SOURCE_DIR "/tests/unit/model/data/checkpoints";

// A copy of a small checkpoint, with room for other files beside it.
class CheckpointFolder {
 public:
  CheckpointFolder()
      : path_(std::filesystem::path(testing::TempDir()) /
              ("engine_test_" + std::to_string(getpid()) + "_" +
               testing::UnitTest::GetInstance()->current_test_info()->name())) {
    std::filesystem::copy(kCheckpoints / "untied_float32", path_);
  }
  ~CheckpointFolder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

EngineOptions with_device(const char* device) {
  EngineOptions options;
  options.device = device;
  return options;
}
EngineOptions with_threads(int threads) {
  EngineOptions options;
  options.threads = threads;
  return options;
}
EngineOptions with_max_positions(std::int64_t max_positions) {
  EngineOptions options;
  options.max_positions = max_positions;
  return options;
}

TEST(ChooseDevice, CpuIsAlwaysThere) {
  EXPECT_EQ(choose_device("cpu").device, "cpu");
  EXPECT_FALSE(choose_device("auto").reason.empty());
  expect_error(ErrorKind::invalid_argument,
               HasSubstr(R"(device must be "auto", "cpu" or "cuda", got "tpu")"),
               [] { choose_device("tpu"); });
}

TEST(Open, RunsACheckpointWithoutATokenizer) {
  const auto engine = Engine::open(kCheckpoints / "untied_float32", with_device("cpu"));
  EXPECT_FALSE(engine->has_tokenizer());
  const EngineInfo info = engine->info();
  EXPECT_EQ(info.device, "cpu");
  EXPECT_FALSE(info.device_description.empty());
  EXPECT_FALSE(info.device_reason.empty());
  EXPECT_EQ(info.max_positions, engine->model().config().max_positions);
  EXPECT_GT(info.kv_bytes_per_position, 0);
  GenerateRequest request;
  request.prompt_tokens = {1, 2, 3};
  request.max_new_tokens = 4;
  request.ignore_eos = true;
  EXPECT_EQ(engine->generate(request).tokens.size(), 4u);
}

TEST(Open, ShortensTheContext) {
  const auto engine = Engine::open(kCheckpoints / "untied_float32", with_max_positions(8));
  EXPECT_EQ(engine->info().max_positions, 8);
  GenerateRequest request;
  request.prompt_tokens = {1, 2, 3};
  request.max_new_tokens = 100;
  request.ignore_eos = true;
  const GenerateResult result = engine->generate(request);
  EXPECT_EQ(result.tokens.size(), 5u);
  EXPECT_EQ(result.finish_reason, FinishReason::context_limit);
}

TEST(Open, ReportsProgressToTheEnd) {
  std::vector<std::pair<std::int64_t, std::int64_t>> seen;
  EngineOptions options = with_device("cpu");
  options.load_progress = [&](std::int64_t done, std::int64_t total) {
    seen.emplace_back(done, total);
  };
  const auto engine = Engine::open(kCheckpoints / "untied_float32", options);
  const std::int64_t total = engine->model().total_bytes();
  EXPECT_THAT(seen, testing::ElementsAre(std::pair(total, total))) << "weights are used in place";
  options.load_progress = [](std::int64_t, std::int64_t) { throw std::runtime_error("enough"); };
  EXPECT_THAT([&] { Engine::open(kCheckpoints / "untied_float32", options); },
              testing::ThrowsMessage<std::runtime_error>("enough"));
}

TEST(Open, RefusesImpossibleOptions) {
  const auto open = [](const EngineOptions& options) {
    return [options] { Engine::open(kCheckpoints / "untied_float32", options); };
  };
  expect_error(ErrorKind::invalid_argument, HasSubstr("device must be"), open(with_device("gpu")));
  expect_error(ErrorKind::invalid_argument, HasSubstr("threads must be >= 0"),
               open(with_threads(-1)));
  expect_error(ErrorKind::invalid_argument, HasSubstr("max_positions must be in [1, 2048]"),
               open(with_max_positions(2049)));
  expect_error(ErrorKind::invalid_argument, HasSubstr("got -1"), open(with_max_positions(-1)));
  expect_error(ErrorKind::not_found, HasSubstr("no-such-folder"),
               [] { Engine::open("no-such-folder"); });
}

TEST(Open, ReadsTheTokenizerBesideTheWeights) {
  const CheckpointFolder folder;
  std::ofstream(folder.path() / "tokenizer.json") << test::tokenizer_json(64);
  const auto engine = Engine::open(folder.path());
  ASSERT_TRUE(engine->has_tokenizer());
  EXPECT_EQ(engine->tokenizer().vocab_size(), 64);
}

TEST(Open, RefusesATokenizerThatIsBroken) {
  const CheckpointFolder folder;
  const std::filesystem::path file = folder.path() / "tokenizer.json";
  std::ofstream(file) << "{";
  expect_error(ErrorKind::malformed, HasSubstr("tokenizer.json"),
               [&] { Engine::open(folder.path()); });
  std::filesystem::remove(file);
  std::filesystem::create_symlink(folder.path() / "gone.json", file);
  expect_error(ErrorKind::not_found, HasSubstr("tokenizer.json"),
               [&] { Engine::open(folder.path()); });
}

TEST(Open, WarnsOfWhatTheFilesBesideTheTokenizerAskFor) {
  const CheckpointFolder folder;
  std::ofstream(folder.path() / "tokenizer.json") << test::tokenizer_json(65);
  std::ofstream(folder.path() / "tokenizer_config.json") << R"({"add_prefix_space": true})";
  EXPECT_THAT(Engine::open(folder.path())->warnings(),
              testing::ElementsAre(HasSubstr("tokenizer_config.json: \"add_prefix_space\" is true"),
                                   HasSubstr("ids up to 64")));
}

TEST(GenerationConfig, IsAppliedAsTransformersDoes) {
  const CheckpointFolder folder;
  const auto request_for = [&](const char* json) {
    std::ofstream(folder.path() / "generation_config.json") << json;
    GenerateRequest request;
    request.max_new_tokens = 7;
    apply_generation_config(Model::open(folder.path())->generation_config(), request);
    return request;
  };
  const GenerateRequest greedy = request_for(R"({"temperature": 0.7, "top_k": 3})");
  EXPECT_EQ(greedy.sampling.temperature, 0) << "do_sample is false by default";
  EXPECT_EQ(greedy.max_new_tokens, 7);
  const GenerateRequest silent = request_for(R"({"do_sample": true, "top_p": null})");
  EXPECT_EQ(silent.sampling.temperature, 1);
  EXPECT_EQ(silent.sampling.top_k, 50);
  EXPECT_EQ(silent.sampling.top_p, 1);
  const GenerateRequest all = request_for(
      R"({"do_sample": true, "temperature": 0.5, "top_k": 0, "top_p": 0.75, "min_p": 0.25,
          "repetition_penalty": 1.5, "max_new_tokens": 9})");
  EXPECT_EQ(all.sampling.temperature, 0.5f);
  EXPECT_EQ(all.sampling.top_k, 0);
  EXPECT_EQ(all.sampling.top_p, 0.75f);
  EXPECT_EQ(all.sampling.min_p, 0.25f);
  EXPECT_EQ(all.sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(all.max_new_tokens, 9);
  expect_error(ErrorKind::malformed, HasSubstr("generation_config.json: \"top_p\" must be"),
               [&] { request_for(R"({"top_p": 2})"); });
  EXPECT_EQ(request_for(R"({"top_p": 0})").sampling.top_p, 1) << "not read without do_sample";
  EXPECT_GT(request_for(R"({"repetition_penalty": 1e-300})").sampling.repetition_penalty, 0);
  for (const char* json : {R"({"repetition_penalty": 0})", R"({"repetition_penalty": -1})",
                           R"({"do_sample": true, "top_p": 0})", R"({"max_new_tokens": -1})",
                           R"({"do_sample": true, "top_k": -1})", R"({"min_p": "0.5"})"}) {
    expect_error(ErrorKind::malformed, HasSubstr("generation_config.json: \""),
                 [&] { request_for(json); });
  }
}

TEST(FinishReason, HasNames) {
  EXPECT_STREQ(name_of(FinishReason::stop_token), "stop_token");
  EXPECT_STREQ(name_of(FinishReason::stop_string), "stop_string");
  EXPECT_STREQ(name_of(FinishReason::token_limit), "token_limit");
  EXPECT_STREQ(name_of(FinishReason::context_limit), "context_limit");
  EXPECT_STREQ(name_of(FinishReason::cancelled), "cancelled");
}

}  // namespace
}  // namespace clusterfusion
