// Random schedules on a small model: whatever company a text has, whenever it comes, and
// however often its memory is taken away, it is bit for bit the text that it is alone.
// CLUSTERFUSION_SCHEDULES says how many schedules, CLUSTERFUSION_FIRST_SCHEDULE from which on, so
// that several processes can share them; each has up to 40 sequences.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <vector>

#include "engine/random_requests.hpp"

namespace clusterfusion {
namespace {

using namespace test;

int number_of(const char* variable, int otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

void expect_texts_alone(const std::shared_ptr<const Model>& model, int first, int count) {
  const auto engine_of = [&](std::int64_t pages, SchedulerOptions scheduling) {
    return schedule_engine(pages, std::move(scheduling), kLongestSchedule, model);
  };
  const auto plain = engine_of(1000, {.max_sequences = 1, .prefix_cache = false});
  ServingStatistics all;
  for (int schedule = first; schedule < first + count; ++schedule) {
    SCOPED_TRACE(testing::Message() << "schedule " << schedule);
    Random random(static_cast<unsigned>(schedule));
    // From what one long text needs to plenty.
    const bool is_tight = random.one_in(2);
    const int longest = is_tight ? 150 : 2000;
    const std::int64_t pages = is_tight ? random.between(6, 12) : random.between(35, 400);
    const auto engine =
        engine_of(pages, {.max_sequences = random.one_in(3) ? random.between(1, 8) : 256,
                          .prefix_cache = !random.one_in(4)});
    std::vector<Call> calls(static_cast<std::size_t>(random.between(1, 12)));
    std::size_t sequences = 0;
    for (Call& call : calls) {
      call = random_call(random, longest);
      for (const GenerateRequest& request : call.requests)
        sequences += static_cast<std::size_t>(request.n);
      if (sequences > 40) call.requests.resize(1);
    }
    run_together(*engine, calls);
    for (const Call& call : calls) expect_as_alone(*plain, call);
    const ServingStatistics statistics = expect_idle(*engine);
    all.preemptions += statistics.preemptions;
    all.prefix_hit_tokens += statistics.prefix_hit_tokens;
    all.prompt_tokens += statistics.prompt_tokens;
    if (testing::Test::HasFailure()) return;
    if ((schedule + 1 - first) % 500 == 0)
      std::cout << schedule + 1 - first << " schedules\n" << std::flush;
  }
  std::cout << all.preemptions << " preemptions, " << all.prefix_hit_tokens << " of "
            << all.prompt_tokens << " prompt tokens found\n";
  if (count >= 30) {
    EXPECT_GT(all.preemptions, 0);
    EXPECT_GT(all.prefix_hit_tokens, all.prompt_tokens / 20);
  }
}

TEST(RandomSchedules, EachTextIsTheOneAlone) {
  expect_texts_alone(schedule_model(), number_of("CLUSTERFUSION_FIRST_SCHEDULE", 0),
                     number_of("CLUSTERFUSION_SCHEDULES", 200));
}

TEST(RandomSchedules, EachTextOfTheLlamaLayoutIsTheOneAlone) {
  expect_texts_alone(schedule_llama(), number_of("CLUSTERFUSION_FIRST_SCHEDULE", 0),
                     number_of("CLUSTERFUSION_SCHEDULES", 200) / 4);
}

// Twice the memory that there is.
TEST(RandomSchedules, MemoryThatRunsOutLosesNothing) {
  const auto plain = schedule_engine(1000, {.max_sequences = 1, .prefix_cache = false});
  const auto engine = schedule_engine(8, {});
  Call call;
  for (int i = 0; i < 8; ++i) {
    GenerateRequest request;
    request.prompt_tokens = {1 + i, 2, 3};
    request.max_new_tokens = 2 * kKvPagePositions - 2;
    request.ignore_eos = true;
    request.sampling = {.temperature = 1, .seed = 7, .num_logprobs = 0};
    call.requests.push_back(request);
  }
  run(*engine, call);
  expect_as_alone(*plain, call);
  std::int64_t preemptions = 0;
  for (const GenerateResult& result : call.results) {
    EXPECT_EQ(result.tokens.size(), 2 * kKvPagePositions - 2);
    preemptions += result.statistics.preemptions;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_EQ(engine->serving_statistics().preemptions, preemptions);
}

}  // namespace
}  // namespace clusterfusion
