// The scheduler on a scripted backend with a clock of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Le;
using testing::SizeIs;

// An engine whose device waits before its first step until go() is called.
class GatedEngine {
 public:
  explicit GatedEngine(const std::function<void(FakeState&)>& set, SchedulerOptions options = {},
                       Script script = hashed_logits()) {
    options.now = [this] { return state_->clock.load(); };
    fake_ = fake_engine(
        std::move(script),
        [&](FakeState& state) {
          state.info.max_positions = 4096;
          set(state);
          state.before_step = [this] {
            if (steps_++ == 0) wait_until([this] { return open_.load(); });
            if (each_step) each_step();
          };
          state_ = &state;
        },
        1 << 14, {}, std::move(options));
  }

  std::unique_ptr<Generation> start(std::vector<GenerateRequest> requests) {
    return fake_.engine->start(std::move(requests));
  }
  // Also waits until the first step is under way, so that what is started later comes later.
  void reach_first_step() {
    wait_until([this] { return steps_ > 0; });
  }
  void go() { open_ = true; }
  FakeState& state() { return *state_; }
  Engine& engine() { return *fake_.engine; }

  std::function<void()> each_step;

 private:
  std::atomic<int> steps_ = 0;
  std::atomic<bool> open_ = false;
  FakeState* state_ = nullptr;
  FakeEngine fake_;
};

GenerateRequest request_of(TokenId first, std::size_t prompt_size, std::int64_t new_tokens) {
  GenerateRequest request;
  for (std::size_t i = 0; i < prompt_size; ++i) {
    request.prompt_tokens.push_back(
        static_cast<TokenId>((static_cast<std::size_t>(first) + i * 31) % kVocabSize));
  }
  request.max_new_tokens = new_tokens;
  request.ignore_eos = true;
  request.sampling = {.temperature = 1, .seed = 5};
  return request;
}

void finish(Generation& generation) {
  while (generation.next()) {
  }
}

std::vector<TokenId> alone(const GenerateRequest& request) {
  const FakeEngine fake =
      fake_engine(hashed_logits(), [](FakeState& state) { state.info.max_positions = 4096; },
                  1 << 14, {}, {.prefix_cache = false});
  return fake.engine->generate(request).tokens;
}

TEST(Scheduler, CallersShareSteps) {
  GatedEngine gated([](FakeState&) {});
  std::vector<std::unique_ptr<Generation>> generations;
  for (int i = 0; i < 3; ++i) generations.push_back(gated.start({request_of(i, 2, 20)}));
  gated.go();
  for (auto& generation : generations) finish(*generation);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(generations[i]->results()[0].tokens, alone(request_of(i, 2, 20)));
  }
  EXPECT_THAT(gated.state().decode_batches, testing::Contains(3u));
  EXPECT_THAT(gated.state().decode_batches, SizeIs(testing::Lt(30u)));
}

TEST(Scheduler, NeverHasMoreSequencesThanItMay) {
  GatedEngine gated([](FakeState&) {}, {.max_sequences = 3});
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 10; ++i) requests.push_back(request_of(i, 3, 4 + i));
  gated.each_step = [&] { EXPECT_THAT(gated.state().live, SizeIs(Le(3u))); };
  gated.go();
  const auto results = gated.engine().generate(requests);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(results[i].tokens, alone(requests[i]));
}

TEST(Scheduler, BurstsAreShortEnoughForNewRequests) {
  GatedEngine gated([](FakeState& state) {
    state.info.decode_ahead = 64;
    state.step_seconds = 0.004;
  });
  gated.go();
  gated.engine().generate(request_of(1, 2, 200));
  const auto& steps = gated.state().burst_steps;
  EXPECT_EQ(steps[0], 1) << "before a step has been measured";
  EXPECT_EQ(steps[1], 6);
  EXPECT_THAT(steps, Each(Le(6)));
  EXPECT_LE(StepClock::kLongestBurstSeconds, 0.030);
}

// Between two decode() calls there is one step, and at most one step's worth of a prompt.
TEST(Scheduler, StreamsDoNotStallForPromptsOfOthers) {
  GatedEngine gated([](FakeState& state) {
    state.info.prefill_chunk = 512;
    state.info.decode_ahead = 16;
    state.step_seconds = 0.010;
    state.prefill_token_seconds = 0.001;
  });
  const auto stream = gated.start({request_of(1, 2, 300)});
  std::unique_ptr<Generation> other;
  gated.go();
  for (int i = 0; i < 50; ++i) stream->next();
  other = gated.start({request_of(2, 1000, 2), request_of(3, 500, 2)});
  finish(*stream);
  finish(*other);
  const auto& times = gated.state().decode_times;
  const auto& steps = gated.state().burst_steps;
  for (std::size_t i = 1; i < times.size() && i < 150; ++i) {
    // The first piece of all is of a size that nothing is known of.
    EXPECT_LE(times[i] - times[i - 1], steps[i - 1] * 0.010 + 0.010 + 0.016) << i;
  }
  EXPECT_EQ(stream->results()[0].tokens, alone(request_of(1, 2, 300)));
  EXPECT_EQ(other->results()[1].tokens, alone(request_of(3, 500, 2)));
}

void use_passes_of_64(FakeState& state) {
  state.info.decodes_as_prefills = true;
  state.info.prefill_chunk = 64;
}

TEST(Scheduler, PromptsSharePasses) {
  GatedEngine gated(use_passes_of_64);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 30; ++i) {
    requests.push_back(request_of(i, static_cast<std::size_t>(1 + i * 7 % 20), 3));
    if (i % 4 == 0) requests.back().num_prompt_logprobs = 1;
  }
  requests.push_back(request_of(31, 200, 2));
  std::size_t tokens = 0;
  for (const GenerateRequest& request : requests) tokens += request.prompt_tokens.size();
  const auto other = gated.start({request_of(100, 3, 1)});
  gated.reach_first_step();
  const auto generation = gated.start(requests);
  gated.go();
  finish(*generation);
  finish(*other);
  EXPECT_EQ(gated.state().prefill_passes.size(), 1 + (tokens + 63) / 64) << "all are full";
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const GenerateResult& result = generation->results()[i];
    EXPECT_EQ(result.tokens, alone(requests[i])) << i;
    const std::size_t scored =
        requests[i].num_prompt_logprobs >= 0 ? requests[i].prompt_tokens.size() - 1 : 0;
    EXPECT_THAT(result.prompt_scores, SizeIs(scored));
  }
  EXPECT_THAT(gated.state().live, IsEmpty());
}

TEST(Scheduler, AnErrorInASharedPassEndsItsCallerAlone) {
  const Script hashed = hashed_logits();
  GatedEngine gated(use_passes_of_64, {}, [&](std::span<const TokenId> tokens) {
    std::vector<float> logits = hashed(tokens);
    if (tokens[0] == 66) logits[7] = std::numeric_limits<float>::quiet_NaN();
    return logits;
  });
  const auto other = gated.start({request_of(100, 3, 1)});
  gated.reach_first_step();
  const auto good = gated.start({request_of(1, 3, 10), request_of(4, 30, 10)});
  const auto bad = gated.start({request_of(2, 3, 10), request_of(66, 3, 10)});
  const auto late = gated.start({request_of(5, 8, 10)});
  gated.go();
  expect_error(ErrorKind::non_finite, HasSubstr("the logit of token 7 is nan"),
               [&] { finish(*bad); });
  finish(*good);
  finish(*late);
  finish(*other);
  EXPECT_EQ(good->results()[0].tokens, alone(request_of(1, 3, 10)));
  EXPECT_EQ(good->results()[1].tokens, alone(request_of(4, 30, 10)));
  EXPECT_EQ(late->results()[0].tokens, alone(request_of(5, 8, 10)));
  EXPECT_THAT(gated.state().live, IsEmpty());
}

TEST(Scheduler, ManyRequestsOfOneCallerDoNotKeepAnotherWaiting) {
  GatedEngine gated([](FakeState&) {}, {.max_sequences = 2});
  std::vector<GenerateRequest> many;
  for (int i = 0; i < 8; ++i) many.push_back(request_of(10 + i, 1, 5 + i));
  const auto first = gated.start(many);
  gated.reach_first_step();
  const auto second = gated.start({request_of(100, 1, 3)});
  gated.go();
  finish(*second);
  finish(*first);
  const auto& order = gated.state().prefilled;
  const auto place = std::ranges::find(order, 100) - order.begin();
  EXPECT_EQ(place, 2) << "the first place that came free";
  EXPECT_EQ(order.size(), 9u);
}

TEST(Scheduler, CallersTakeTurnsWithPiecesOfPrompts) {
  GatedEngine gated([](FakeState&) {});
  const auto slow = gated.start({request_of(1, 40, 2)});
  gated.reach_first_step();
  const auto quick = gated.start({request_of(2, 4, 2)});
  gated.go();
  finish(*quick);
  finish(*slow);
  EXPECT_EQ(gated.state().prefilled[1], 2) << "behind the piece that ran";
}

TEST(Scheduler, PreemptsTheYoungestAndComputesItAgain) {
  for (const bool decodes_as_prefills : {true, false}) {
    SCOPED_TRACE(decodes_as_prefills);
    GatedEngine gated(
        [&](FakeState& state) {
          state.info.decodes_as_prefills = decodes_as_prefills;
          state.info.kv_pages = 5;
          state.info.decode_ahead = 4;
        },
        {.prefix_cache = false});
    std::vector<GenerateRequest> requests;
    for (int i = 0; i < 3; ++i) requests.push_back(request_of(i, 10, 140));
    std::vector<std::size_t> endings;
    const auto generation = gated.start(requests);
    gated.go();
    while (const auto event = generation->next()) {
      if (event->finish_reason) endings.push_back(event->index);
    }
    const auto& results = generation->results();
    for (int i = 0; i < 3; ++i) EXPECT_EQ(results[i].tokens, alone(requests[i]));
    EXPECT_EQ(endings[0], 0u);
    EXPECT_EQ(results[0].statistics.preemptions, 0);
    EXPECT_GT(results[2].statistics.preemptions, 0);
    EXPECT_EQ(gated.engine().serving_statistics().preemptions,
              results[1].statistics.preemptions + results[2].statistics.preemptions);
    if (!decodes_as_prefills) {
      // Each prompt again, and no more.
      const auto& pieces = gated.state().prefill_sizes;
      EXPECT_EQ(std::accumulate(pieces.begin(), pieces.end(), std::int64_t{0}),
                10 * (3 + gated.engine().serving_statistics().preemptions));
    }
    EXPECT_THAT(gated.state().live, IsEmpty());
    EXPECT_EQ(gated.engine().serving_statistics().kv_pages_in_use, 0);
  }
}

// A device with less memory than it said.
TEST(Scheduler, PreemptsWhereTheDeviceItselfHasNoMemory) {
  const FakeEngine fake = fake_engine(
      hashed_logits(), [](FakeState& state) { state.info.max_positions = 4096; }, /*capacity=*/3);
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 3; ++i) requests.push_back(request_of(i, 10, 140));
  const auto results = fake.engine->generate(requests);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(results[i].tokens, alone(requests[i]));
  expect_error(ErrorKind::out_of_memory, HasSubstr("the script has 3 pages"),
               [&] { fake.engine->generate(request_of(1, 250, 9)); });
  EXPECT_EQ(fake.engine->generate(requests[0]).tokens, alone(requests[0]));
}

TEST(Scheduler, AnErrorOfOneSequenceEndsItsCallerAlone) {
  const Script hashed = hashed_logits();
  GatedEngine gated([](FakeState&) {}, {},
                    [&](std::span<const TokenId> tokens) {
                      std::vector<float> logits = hashed(tokens);
                      if (tokens[0] == 66 && tokens.size() > 9)
                        logits[7] = std::numeric_limits<float>::quiet_NaN();
                      return logits;
                    });
  const auto good = gated.start({request_of(1, 3, 40)});
  const auto bad = gated.start({request_of(2, 3, 40), request_of(66, 3, 40)});
  gated.go();
  expect_error(ErrorKind::non_finite, HasSubstr("the logit of token 7 is nan"),
               [&] { finish(*bad); });
  EXPECT_FALSE(bad->next());
  EXPECT_THAT(bad->results()[1].tokens, SizeIs(7)) << "what came before the error";
  finish(*good);
  EXPECT_EQ(good->results()[0].tokens, alone(request_of(1, 3, 40)));
  EXPECT_THAT(gated.state().live, IsEmpty());
}

TEST(Scheduler, ACancelledCallerLeavesOthersAlone) {
  GatedEngine gated([](FakeState&) {});
  const auto one = gated.start({request_of(1, 3, 2000)});
  const auto other = gated.start({request_of(2, 3, 60)});
  const auto waiting = gated.start({request_of(3, 3, 60)});
  gated.go();
  waiting->cancel();
  one->next();
  one->cancel();
  finish(*one);
  finish(*other);
  EXPECT_EQ(one->results()[0].finish_reason, FinishReason::cancelled);
  EXPECT_THAT(one->results()[0].tokens, SizeIs(1)) << "no more than what came out";
  EXPECT_EQ(other->results()[0].tokens, alone(request_of(2, 3, 60)));
  EXPECT_EQ(waiting->next()->finish_reason, FinishReason::cancelled);
}

TEST(Scheduler, OtherCallsComeBetweenBursts) {
  GatedEngine gated([](FakeState& state) { state.info.max_positions = 1 << 20; });
  const auto endless = gated.start({request_of(1, 1, 1 << 19)});
  gated.go();
  endless->next();
  EXPECT_THAT(gated.engine().score(request_of(5, 20, 0).prompt_tokens).logprobs, SizeIs(19));
  EXPECT_GT(gated.engine().measure_read_ceiling(), 0);
  endless->cancel();
  finish(*endless);
}

TEST(PrefixHits, OfWholePages) {
  GatedEngine gated([](FakeState& state) {
    state.info.decodes_as_prefills = true;
    state.info.prefill_chunk = 512;
  });
  gated.go();
  GenerateRequest request = request_of(1, 130, 70);
  const GenerateResult first = gated.engine().generate(request);
  EXPECT_EQ(first.tokens, alone(request));
  EXPECT_EQ(first.statistics.prefix_hit_tokens, 0);
  const GenerateResult again = gated.engine().generate(request);
  EXPECT_EQ(again.tokens, first.tokens);
  EXPECT_EQ(again.statistics.prefix_hit_tokens, 128);
  // The text as the next prompt: what was decoded is there as well.
  request.prompt_tokens.insert(request.prompt_tokens.end(), first.tokens.begin(),
                               first.tokens.end());
  const GenerateResult longer = gated.engine().generate(request);
  EXPECT_EQ(longer.tokens, alone(request));
  EXPECT_EQ(longer.statistics.prefix_hit_tokens, 192);
  request.prompt_tokens.resize(128);
  EXPECT_EQ(gated.engine().generate(request).statistics.prefix_hit_tokens, 64)
      << "a token is left for the logits";
  EXPECT_THAT(gated.state().prefill_sizes, ElementsAre(130, 2, 8, 64));
  request.num_prompt_logprobs = 0;
  EXPECT_EQ(gated.engine().generate(request).statistics.prefix_hit_tokens, 0)
      << "the scores need every position";
  const ServingStatistics statistics = gated.engine().serving_statistics();
  EXPECT_EQ(statistics.prefix_hit_tokens, 128 + 192 + 64);
  EXPECT_EQ(statistics.prompt_tokens, 130 + 130 + 200 + 128 + 128);
  EXPECT_EQ(statistics.kv_pages_in_use, statistics.kv_pages_cached);
}

TEST(PrefixHits, OfPromptsAloneWhereDecodingGivesOtherBits) {
  GatedEngine gated([](FakeState& state) { state.info.prefill_chunk = 512; });
  gated.go();
  GenerateRequest request = request_of(1, 130, 70);
  const GenerateResult first = gated.engine().generate(request);
  EXPECT_EQ(first.tokens, alone(request));
  EXPECT_EQ(gated.engine().generate(request).statistics.prefix_hit_tokens, 128);
  request.prompt_tokens.insert(request.prompt_tokens.end(), first.tokens.begin(),
                               first.tokens.end());
  const GenerateResult longer = gated.engine().generate(request);
  EXPECT_EQ(longer.tokens, alone(request));
  EXPECT_EQ(longer.statistics.prefix_hit_tokens, 128);
  EXPECT_THAT(gated.state().prefill_sizes, ElementsAre(130, 2, 72));
}

TEST(PrefixHits, NoneWithoutTheOptionOrTheMemory) {
  const auto set = [](FakeState& state) {
    state.info.decodes_as_prefills = true;
    state.info.prefill_chunk = 512;
    state.info.kv_pages = 5;
  };
  GatedEngine off(set, {.prefix_cache = false});
  off.go();
  GatedEngine on(set);
  on.go();
  for (const TokenId first : {1, 1, 2, 3, 1}) {
    const GenerateRequest request = request_of(first, 150, 3);
    EXPECT_EQ(off.engine().generate(request).statistics.prefix_hit_tokens, 0);
    on.engine().generate(request);
    EXPECT_EQ(off.engine().serving_statistics().kv_pages_in_use, 0);
    EXPECT_LE(on.engine().serving_statistics().kv_pages_in_use, 5);
  }
  EXPECT_EQ(on.engine().serving_statistics().prefix_hit_tokens, 128) << "of the second alone";
}

TEST(Samples, ShareOnePromptAndEqualRequestsOfTheirSeeds) {
  for (const bool decodes_as_prefills : {true, false}) {
    SCOPED_TRACE(decodes_as_prefills);
    GatedEngine gated([&](FakeState& state) {
      state.info.decodes_as_prefills = decodes_as_prefills;
      state.info.prefill_chunk = 100;
    });
    gated.go();
    GenerateRequest request = request_of(1, 150, 80);
    request.n = 5;
    request.num_prompt_logprobs = 0;
    request.sampling.num_logprobs = 0;
    GenerateRequest other = request_of(2, 30, 5);
    const auto results = gated.engine().generate({request, other});
    ASSERT_THAT(results, SizeIs(6));
    EXPECT_EQ(std::accumulate(gated.state().prefill_sizes.begin(),
                              gated.state().prefill_sizes.end(), std::int64_t{0}),
              180);
    request.n = 1;
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(results[i].tokens, alone(request)) << i;
      EXPECT_EQ(results[i].prompt_scores.size(), 149u);
      EXPECT_EQ(results[i].statistics.prefix_hit_tokens, i == 0 ? 0 : 150);
      ++request.sampling.seed;
    }
    EXPECT_EQ(results[5].tokens, alone(other));
    EXPECT_NE(results[0].tokens, results[1].tokens);
    const ServingStatistics statistics = gated.engine().serving_statistics();
    EXPECT_EQ(statistics.kv_pages_in_use, statistics.kv_pages_cached);
  }
}

TEST(Samples, MoreThanThereArePlacesOrPages) {
  for (const std::int64_t kv_pages : {4, 100}) {
    GatedEngine gated(
        [&](FakeState& state) {
          state.info.kv_pages = kv_pages;
          state.info.decodes_as_prefills = true;
        },
        {.max_sequences = 3});
    gated.go();
    GenerateRequest request = request_of(1, 70, 20);
    request.n = 9;
    const auto results = gated.engine().generate(std::vector{request});
    request.n = 1;
    for (const GenerateResult& result : results) {
      EXPECT_EQ(result.tokens, alone(request));
      ++request.sampling.seed;
    }
  }
}

TEST(Samples, HaveRoomInAListOfResultsOnly) {
  GatedEngine gated([](FakeState&) {});
  GenerateRequest request = one_token_request(3);
  request.n = 2;
  expect_error(ErrorKind::invalid_argument, HasSubstr("n is 2"),
               [&] { gated.engine().generate(request); });
  request.n = 0;
  expect_error(ErrorKind::invalid_argument, HasSubstr("n must be in [1, 65536]"),
               [&] { gated.engine().start({request}); });
}

std::vector<SteeringVector> some_steering(const Engine& engine, float value) {
  const auto hidden = static_cast<std::size_t>(engine.model().config().hidden_size);
  return {{.layer = 0, .values = std::vector<float>(hidden, value), .positions = 0}};
}

// The fake checks that no page goes from one to the other.
TEST(Scheduler, PagesOfSteeredTextsStayOutOfTheCache) {
  GatedEngine gated([](FakeState& state) {
    state.info.decodes_as_prefills = true;
    state.info.prefill_chunk = 64;
  });
  gated.go();
  Engine& engine = gated.engine();
  const GenerateRequest request = request_of(1, 2 * kKvPagePositions + 5, 3);
  const auto hits = [&] { return engine.generate(request).statistics.prefix_hit_tokens; };
  EXPECT_EQ(hits(), 0);
  EXPECT_EQ(hits(), 2 * kKvPagePositions);
  for (const float value : {1.0f, 2.0f}) {
    engine.steer(some_steering(engine, value));
    EXPECT_EQ(hits(), 0);
    EXPECT_EQ(hits(), 0);
  }
  engine.steer({});
  EXPECT_EQ(hits(), 2 * kKvPagePositions);
}

TEST(Scheduler, SamplesOfASteeredPromptShareItsPages) {
  GatedEngine gated([](FakeState& state) { state.info.prefill_chunk = 512; });
  gated.go();
  Engine& engine = gated.engine();
  engine.steer(some_steering(engine, 1));
  GenerateRequest request = request_of(1, kKvPagePositions + 5, 4);
  request.n = 3;
  const auto results = engine.generate(std::vector{request});
  EXPECT_THAT(gated.state().prefilled_under, SizeIs(1));
  ASSERT_THAT(results, SizeIs(3));
  request.n = 1;
  for (const GenerateResult& result : results) {
    EXPECT_EQ(result.tokens, alone(request));
    ++request.sampling.seed;
  }
}

// Steering that changes while texts run, and memory that runs out.
TEST(Scheduler, PreemptedTextsKeepTheirInterventions) {
  GatedEngine gated([](FakeState& state) {
    state.info.decodes_as_prefills = true;
    state.info.prefill_chunk = 64;
    state.info.kv_pages = 4;
  });
  Engine& engine = gated.engine();
  std::vector<std::unique_ptr<Generation>> generations;
  for (TokenId first = 0; first < 3; ++first) {
    engine.steer(some_steering(engine, 1.0f + static_cast<float>(first)));
    generations.push_back(gated.start({request_of(first, 3, 2 * kKvPagePositions)}));
    if (first == 0) gated.reach_first_step();
  }
  engine.steer({});
  gated.go();
  std::int64_t preemptions = 0;
  for (auto& generation : generations) {
    finish(*generation);
    preemptions += generation->results()[0].statistics.preemptions;
  }
  EXPECT_GT(preemptions, 0);
  const FakeState& state = gated.state();
  for (std::size_t i = 0; i < state.prefilled.size(); ++i) {
    ASSERT_NE(state.prefilled_under[i], nullptr);
    EXPECT_EQ(state.prefilled_under[i]->layers[0].steering[0],
              1.0f + static_cast<float>(state.prefilled[i]));
  }
}

}  // namespace
}  // namespace clusterfusion
