// Many generations read by one caller that never waits: texts are those of the engine alone.
#include "clusterfusion/generation_feed.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

// What came out of a feed under each key.
struct Record {
  std::map<std::size_t, std::string> texts;
  std::map<std::size_t, std::vector<TokenId>> tokens;
  std::vector<GenerateResult> results;
  std::string error;
  bool has_ended = false;
};

// A feed that is read when it wakes its reader, and then only.
class Reader {
 public:
  explicit Reader(Engine& engine) : feed(engine, [this] { ++wakes_; }) {}

  void read_until_ended(std::size_t count) {
    while (num_ended_ < count) {
      wait_until([&] { return wakes_.load() > 0; });
      wakes_ = 0;
      for (GenerationFeed::News& news : feed.take()) read(news);
    }
  }
  int wakes() const { return wakes_; }

  std::map<GenerationFeed::Key, Record> records;

 private:
  void read(GenerationFeed::News& news) {
    Record& record = records[news.key];
    EXPECT_FALSE(record.has_ended) << "news behind the end";
    for (const GenerateEvent& event : news.events) {
      record.texts[event.index] += event.text;
      if (event.token) record.tokens[event.index].push_back(event.token->token);
    }
    if (!news.has_ended) return;
    ++num_ended_;
    record.has_ended = true;
    record.results = news.generation->results();
    try {
      if (news.error) std::rethrow_exception(news.error);
    } catch (const Error& error) {
      record.error = error.what();
    }
  }

  std::atomic<int> wakes_ = 0;  // declared first: the feed calls into it
  std::size_t num_ended_ = 0;

 public:
  GenerationFeed feed;
};

GenerateRequest sampled_request(std::mt19937& random) {
  GenerateRequest request;
  for (std::size_t i = 0; i < 1 + random() % 9; ++i) {
    request.prompt_tokens.push_back(static_cast<TokenId>(random() % 256 + 1));
  }
  request.max_new_tokens = static_cast<std::int64_t>(random() % 40);
  request.n = static_cast<std::int32_t>(1 + random() % 3);
  request.sampling = {.temperature = 1, .seed = random()};
  if (random() % 2 == 0) request.num_prompt_logprobs = 2;
  return request;
}

TEST(GenerationFeed, GivesWhatTheEngineGivesAlone) {
  const FakeEngine fake = fake_engine(hashed_logits());
  std::mt19937 random(1);
  Reader reader(*fake.engine);
  std::map<GenerationFeed::Key, std::vector<GenerateRequest>> started;
  std::map<GenerationFeed::Key, bool> wants_events;
  for (int i = 0; i < 60; ++i) {
    std::vector<GenerateRequest> requests;
    for (std::size_t r = 0; r < random() % 4; ++r) requests.push_back(sampled_request(random));
    const bool wanted = random() % 2 == 0;
    const GenerationFeed::Key key = reader.feed.start(requests, wanted);
    started[key] = requests;
    wants_events[key] = wanted;
  }
  reader.read_until_ended(started.size());
  for (const auto& [key, requests] : started) {
    const Record& record = reader.records[key];
    EXPECT_THAT(record.error, IsEmpty());
    const std::vector<GenerateResult> alone = fake.engine->generate(requests);
    ASSERT_THAT(record.results, SizeIs(alone.size()));
    if (!wants_events[key]) {
      EXPECT_THAT(record.tokens, IsEmpty());
    }
    for (std::size_t i = 0; i < alone.size(); ++i) {
      EXPECT_EQ(record.results[i].text, alone[i].text);
      EXPECT_EQ(record.results[i].tokens, alone[i].tokens);
      EXPECT_EQ(record.results[i].finish_reason, alone[i].finish_reason);
      EXPECT_EQ(record.results[i].prompt_scores.size(), alone[i].prompt_scores.size());
      if (!wants_events[key]) continue;
      EXPECT_EQ(reader.records[key].texts[i], alone[i].text);
      EXPECT_EQ(reader.records[key].tokens[i], alone[i].tokens);
    }
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(GenerationFeed, WakesOnceUntilItIsRead) {
  const FakeEngine fake = fake_engine(say("hello"));
  Reader reader(*fake.engine);
  reader.feed.start({one_token_request(20)}, true);
  reader.feed.start({one_token_request(20)}, true);
  wait_until([&] {
    return fake.engine->serving_statistics().sequences_active == 0 &&
           fake.engine->serving_statistics().prompt_tokens == 2;
  });
  EXPECT_EQ(reader.wakes(), 1);
  reader.read_until_ended(2);
}

TEST(GenerationFeed, CancelsWithoutWaiting) {
  std::atomic<bool> go_on = false;
  std::atomic<int> steps = 0;
  const FakeEngine fake = fake_engine(say("hello"),
                                      [&](FakeState& state) {
                                        state.info.max_positions = 1 << 20;
                                        state.before_step = [&] {
                                          if (++steps == 4)
                                            wait_until([&] { return go_on.load(); });
                                        };
                                      },
                                      1 << 20, {}, {.max_sequences = 1});
  Reader reader(*fake.engine);
  const auto running = reader.feed.start({one_token_request(1 << 18)}, true);
  wait_until([&] { return steps == 4; });
  const auto waiting = reader.feed.start({one_token_request(1 << 18)}, false);
  reader.feed.cancel(running);
  reader.feed.cancel(waiting);
  reader.feed.cancel(waiting + 100);  // never was
  for (const auto& news : reader.feed.take()) EXPECT_FALSE(news.has_ended);
  go_on = true;
  reader.read_until_ended(2);
  for (const auto key : {running, waiting}) {
    const GenerateResult& result = reader.records[key].results.at(0);
    EXPECT_EQ(result.finish_reason, FinishReason::cancelled);
    EXPECT_TRUE(std::string("hello" + std::string(1 << 18, 'x')).starts_with(result.text));
  }
  EXPECT_THAT(reader.records[waiting].results.at(0).tokens, IsEmpty());
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(GenerationFeed, TellsErrorsAndGoesOn) {
  std::atomic<int> steps = 0;
  const FakeEngine fake = fake_engine(say("hello"), [&](FakeState& state) {
    state.before_step = [&] {
      if (++steps == 3) throw Error(ErrorKind::internal, "the device is gone");
    };
  });
  Reader reader(*fake.engine);
  const auto failed = reader.feed.start({one_token_request(9)}, true);
  reader.read_until_ended(1);
  EXPECT_THAT(reader.records[failed].error, HasSubstr("the device is gone"));
  expect_error(ErrorKind::invalid_argument, HasSubstr("max_new_tokens must be >= 0"),
               [&] { reader.feed.start({one_token_request(-1)}, true); });
  const auto next = reader.feed.start({one_token_request(5)}, true);
  reader.read_until_ended(2);
  EXPECT_EQ(reader.records[next].texts[0], "hello");
}

TEST(GenerationFeed, GivesScoresOfThePromptWithTheFirstToken) {
  const FakeEngine fake = fake_engine(hashed_logits());
  GenerateRequest request = one_token_request(3);
  request.prompt_tokens = bytes_to_tokens("some prompt that takes several pieces");
  request.num_prompt_logprobs = 1;
  const GenerateResult alone = fake.engine->generate(request);
  std::atomic<int> wakes = 0;
  GenerationFeed feed(*fake.engine, [&] { ++wakes; });
  const auto key = feed.start({request}, true);
  for (bool ended = false; !ended;) {
    for (const auto& news : feed.take()) {
      if (!news.events.empty() && !news.has_ended) {
        const std::vector<ScoredToken> scores = feed.prompt_scores(key, 0);
        ASSERT_THAT(scores, SizeIs(request.prompt_tokens.size() - 1));
        EXPECT_EQ(scores.back().logprob, alone.prompt_scores.back().logprob);
      }
      ended = ended || news.has_ended;
    }
  }
  EXPECT_THAT(feed.prompt_scores(key, 0), IsEmpty());
}

TEST(GenerationFeed, EndsWhatRunsWhenItGoes) {
  const FakeEngine fake = fake_engine(
      say("hello"), [](FakeState& state) { state.info.max_positions = 1 << 20; }, 1 << 20);
  {
    GenerationFeed feed(*fake.engine, [] {});
    feed.start({one_token_request(1 << 18), one_token_request(1 << 18)}, true);
    feed.start({one_token_request(1 << 18)}, false);
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

}  // namespace
}  // namespace clusterfusion
