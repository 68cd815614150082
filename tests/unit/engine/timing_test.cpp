#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::fake_engine;
using test::FakeState;
using testing::Each;
using testing::HasSubstr;

const std::vector<TokenId> kPrompt = {5, 6, 7, 8, 9, 10};

TEST(TimeDecode, DecodesInBurstsThatBeginAtTheSameLength) {
  const auto fake =
      fake_engine(test::hashed_logits(), [](FakeState& state) { state.info.decode_ahead = 4; });
  const DecodeTiming timing = fake.engine->time_decode(kPrompt, 10);
  EXPECT_EQ(timing.seconds_per_token.size(), 3u) << "at least 10 tokens in bursts of 4";
  // One burst before is not timed; what the fake backend reserves is what a sequence may hold.
  EXPECT_THAT(fake.state->burst_starts, testing::ElementsAre(6, 6, 6, 6));
  EXPECT_EQ(fake.state->reserved, std::vector<std::int64_t>{10});
  EXPECT_TRUE(fake.state->live.empty());
  // A step reads the keys and values of 7, 8, 9 and 10 positions.
  const double weights = static_cast<double>(fake.engine->model().bytes_per_token());
  EXPECT_DOUBLE_EQ(timing.bytes_per_token, weights + 8.5 * 16);
}

TEST(TimeDecode, EndsABurstWithTheContext) {
  const auto fake =
      fake_engine(test::hashed_logits(), [](FakeState& state) { state.info.decode_ahead = 4; });
  const std::vector<TokenId> prompt(63, 7);
  const DecodeTiming timing = fake.engine->time_decode(prompt, 1);
  EXPECT_EQ(timing.seconds_per_token.size(), 1u);
  EXPECT_THAT(fake.state->burst_starts, testing::ElementsAre(63, 63)) << "one token is one step";
  fake.state->burst_starts.clear();
  fake.engine->time_decode(prompt, 8);
  EXPECT_THAT(fake.state->burst_starts, testing::ElementsAre(60, 60, 60));
}

TEST(TimeDecode, TakesTheTimeOfTheSteps) {
  const auto fake = fake_engine(test::hashed_logits(), [](FakeState& state) {
    state.info.decode_ahead = 2;
    state.before_step = [] { std::this_thread::sleep_for(std::chrono::milliseconds(4)); };
  });
  const DecodeTiming timing = fake.engine->time_decode(kPrompt, 4);
  EXPECT_GE(timing.prefill_seconds, 0.008) << "two pieces";
  EXPECT_THAT(timing.seconds_per_token, Each(testing::Ge(0.002))) << "of two steps each";
}

TEST(TimeDecode, RefusesWhatItCannotDo) {
  const auto fake = fake_engine(test::hashed_logits());
  expect_error(ErrorKind::invalid_argument, HasSubstr("at least 1, got 0"),
               [&] { fake.engine->time_decode(kPrompt, 0); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("the prompt has 0 tokens"),
               [&] { fake.engine->time_decode({}, 1); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("the prompt has 64 tokens"),
               [&] { fake.engine->time_decode(std::vector<TokenId>(64, 1), 1); });
  expect_error(ErrorKind::out_of_range, HasSubstr("9999"), [&] {
    fake.engine->time_decode(std::vector<TokenId>{1, 9999}, 1);
  });
}

TEST(RecordTimeline, ShowsAStepBehindThePrompt) {
  const auto fake = fake_engine(test::hashed_logits(), [](FakeState& state) {
    state.timeline = {{.sm = 3, .layer = 1, .phase = "attention", .begin_ns = 10, .end_ns = 20}};
  });
  const std::vector<TimelineEvent> events = fake.engine->record_timeline(kPrompt);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].sm, 3);
  EXPECT_EQ(events[0].phase, "attention");
  EXPECT_EQ(fake.state->burst_starts.back(), 6) << "the recorded step";
  EXPECT_TRUE(fake.state->live.empty());
}

TEST(RecordTimeline, IsNotForTheCpu) {
  const auto engine =
      Engine::open(CF_SOURCE_DIR "/tests/unit/model/data/checkpoints/untied_float32",
                   {.device = "cpu", .kv_dtype = std::nullopt});
  expect_error(ErrorKind::unsupported, HasSubstr("none to record on device \"cpu\""), [&] {
    engine->record_timeline(std::vector<TokenId>{1, 2, 3});
  });
}

}  // namespace
}  // namespace clusterfusion
