// Several rows of one sequence in one step (for drafts that are verified, and pieces of prompts):
// each has the bits of the same position computed alone.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/kv_pool.hpp"
#include "backend/cuda/stream/stream_decoder.hpp"
#include "gpu_fixture.hpp"

namespace clusterfusion::test {
namespace {

using namespace cuda;

class SequenceRows : public GpuTest, public testing::WithParamInterface<Shape> {
 protected:
  struct Sequence {
    std::vector<char*> pages;
    std::vector<TokenId> tokens;
  };

  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    properties_ = device_properties();
    config_ = config_of(GetParam());
    model_ = make_random_model(config_);
    const plan::KvPlan kv = kv_plan_of(config_);
    if (!StreamDecoder::supports(config_, kv, properties_)) GTEST_SKIP() << "no kernel for rows";
    weights_ = std::make_unique<DeviceModel>(*model_, DeviceModelOptions{1024, kv.page_bytes, {}});
    pool_ = std::make_unique<KvPool>(kv.page_bytes);
    decoder_ = std::make_unique<StreamDecoder>(config_, kv, *weights_, properties_, 1024, 1);
  }

  Sequence sequence(std::mt19937& random, int length) {
    Sequence result;
    for (int page = 0; page <= length / 64 + 1; ++page) result.pages.push_back(pool_->take());
    result.tokens = random_tokens(config_.vocab_size, length, random());
    return result;
  }
  DecodeRow row(const Sequence& sequence, std::int64_t position) const {
    return {.position = position,
            .input = sequence.tokens[position],
            .drawable_vocab_size = static_cast<std::int32_t>(config_.vocab_size),
            .pages = sequence.pages};
  }
  std::vector<std::vector<float>> run(const std::vector<DecodeRow>& rows) {
    decoder_->enqueue(rows, 1, true, nullptr);
    check(cudaDeviceSynchronize(), "running the streaming kernel");
    std::vector<std::vector<float>> logits(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      logits[i].resize(config_.vocab_size);
      check(cudaMemcpy(logits[i].data(), decoder_->logits(i), logits[i].size() * sizeof(float),
                       cudaMemcpyDeviceToHost),
            "fetching logits");
    }
    return logits;
  }

  cudaDeviceProp properties_{};
  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<DeviceModel> weights_;
  std::unique_ptr<KvPool> pool_;
  std::unique_ptr<StreamDecoder> decoder_;
};

TEST_P(SequenceRows, HaveTheBitsOfEachPositionAlone) {
  std::mt19937 random(17);
  constexpr int kLength = 150;
  const Sequence sequence = this->sequence(random, kLength), other = this->sequence(random, 40);
  std::vector<std::vector<float>> alone, other_alone;
  for (int position = 0; position < kLength; ++position)
    alone.push_back(run({row(sequence, position)})[0]);
  for (int position = 0; position < 40; ++position)
    other_alone.push_back(run({row(other, position)})[0]);
  // Over the same pages again, in pieces of any size, with a row of another sequence beside them.
  for (int position = 0; position < kLength;) {
    const int most = std::min(15, kLength - position);
    const int count = 1 + static_cast<int>(random() % most);
    std::vector<DecodeRow> rows;
    for (int i = 0; i < count; ++i) rows.push_back(row(sequence, position + i));
    const int beside = static_cast<int>(random() % 40);
    rows.push_back(row(other, beside));
    const auto logits = run(rows);
    for (int i = 0; i < count; ++i)
      ASSERT_EQ(std::memcmp(logits[i].data(), alone[position + i].data(),
                            logits[i].size() * sizeof(float)),
                0)
          << "position " << position + i << ", row " << i << " of " << count;
    ASSERT_EQ(logits[count], other_alone[beside]);
    position += count;
  }
}

// So long that tasks take 8 queries where there are many heads, and 16 where these are narrow too,
// lest there be more tasks than SMs.
TEST_P(SequenceRows, HaveThemInLongContextsToo) {
  std::mt19937 random(18);
  constexpr int kLength = 1000, kCompared = 200;
  const Sequence sequence = this->sequence(random, kLength);
  std::vector<std::vector<float>> alone;
  for (int position = 0; position < kLength; ++position) {
    auto logits = run({row(sequence, position)});
    if (position >= kLength - kCompared) alone.push_back(std::move(logits[0]));
  }
  for (int i = 0; i < kCompared;) {
    const int count = std::min(1 + static_cast<int>(random() % 16), kCompared - i);
    std::vector<DecodeRow> rows;
    for (int r = 0; r < count; ++r) rows.push_back(row(sequence, kLength - kCompared + i + r));
    const auto logits = run(rows);
    for (int r = 0; r < count; ++r, ++i)
      ASSERT_EQ(std::memcmp(logits[r].data(), alone[i].data(), logits[r].size() * sizeof(float)), 0)
          << "position " << kLength - kCompared + i << ", row " << r << " of " << count;
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, SequenceRows, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
