// Random schedules on a small model on the CPU: whatever company a text has, whenever it comes, and
// however often its memory is taken away, it is bit for bit the text that it is alone.
// CLUSTERFUSION_SCHEDULES says how many schedules, CLUSTERFUSION_FIRST_SCHEDULE from which on, so
// that several processes can share them; each has up to 40 sequences.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

using namespace test;

constexpr std::int64_t kLongest = 2100;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int end) { return static_cast<int>(engine_() % static_cast<unsigned>(end)); }
  int between(int least, int most) { return least + below(most - least + 1); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  std::mt19937 engine_;
};

std::shared_ptr<const Model> schedule_model() {
  static const std::shared_ptr<const Model> model = [] {
    ModelConfig config = small_config();
    config.vocab_size = kVocabSize;
    config.max_positions = 4096;
    config.bos_token.reset();
    config.eos_tokens = {kEndOfText};
    return make_random_model(config);
  }();
  return model;
}

std::unique_ptr<Engine> schedule_engine(std::int64_t kv_pages, SchedulerOptions scheduling) {
  BackendOptions options;
  options.threads = 1;
  options.max_positions = kLongest;
  const std::int64_t page_bytes =
      make_cpu_backend(schedule_model(), options)->info().kv_bytes_per_position * kKvPagePositions;
  options.kv_bytes = kv_pages * page_bytes;
  return make_engine(schedule_model(), byte_tokenizer(),
                     make_cpu_backend(schedule_model(), options), "a test", {},
                     std::move(scheduling));
}

// Few beginnings, so that prompts meet in the prefix cache, with ends of their own.
std::vector<TokenId> random_prompt(Random& random, int longest) {
  const int length = std::min(longest, random.one_in(60)  ? random.between(500, 2000)
                                       : random.one_in(6) ? random.between(64, 300)
                                                          : random.between(1, 70));
  const int beginning = random.below(3);
  const int own = random.one_in(3) ? 0 : random.between(0, length);
  const int ending = random.below(1000);
  std::vector<TokenId> tokens;
  for (int i = 0; i < length; ++i) {
    const int seed = i < length - own ? beginning : 100 + ending;
    tokens.push_back(static_cast<TokenId>((seed * 7919 + i * 104729 + i * i) % kVocabSize));
  }
  return tokens;
}

SamplingParams random_sampling(Random& random) {
  SamplingParams sampling;
  if (random.one_in(4)) return sampling;
  sampling.temperature = 0.5f + 0.1f * static_cast<float>(random.below(10));
  sampling.seed = static_cast<std::uint64_t>(random.below(5));
  if (random.one_in(3)) sampling.top_k = random.between(1, 50);
  if (random.one_in(3)) sampling.top_p = 0.5f + 0.05f * static_cast<float>(random.below(10));
  if (random.one_in(4)) sampling.min_p = 0.05f;
  if (random.one_in(4)) sampling.repetition_penalty = 1.3f;
  if (random.one_in(5)) sampling.frequency_penalty = 0.5f;
  if (random.one_in(5)) sampling.presence_penalty = -0.4f;
  if (random.one_in(6)) sampling.no_repeat_ngram_size = random.between(2, 4);
  if (random.one_in(6)) sampling.logit_bias = {{random.between(1, 200), 5.0f}};
  if (random.one_in(4)) sampling.num_logprobs = random.between(0, 3);
  return sampling;
}

GenerateRequest random_request(Random& random, int longest) {
  GenerateRequest request;
  request.prompt_tokens = random_prompt(random, longest);
  request.max_new_tokens = random.one_in(12) ? random.between(60, 200) : random.between(0, 40);
  request.sampling = random_sampling(random);
  request.ignore_eos = random.one_in(2);
  if (random.one_in(3)) request.stop_tokens = {random.between(1, kVocabSize - 1)};
  if (random.one_in(4))
    request.stop_strings = {std::string(1, static_cast<char>('a' + random.below(26)))};
  if (random.one_in(5))
    request.min_new_tokens = random.between(0, static_cast<int>(request.max_new_tokens));
  if (random.one_in(8)) request.num_prompt_logprobs = random.between(0, 2);
  if (random.one_in(6)) request.n = random.between(2, 5);
  return request;
}

// What one caller does.
struct Call {
  std::vector<GenerateRequest> requests;
  int cancel_after = -1;  // so many events; -1: never
  int delay_us = 0;
  int intervention = 0;  // see intervene()
  std::vector<GenerateResult> results;
};

// 0 for none; the others differ.
void intervene(Engine& engine, int intervention) {
  SteeringVector vector{.layer = 1, .values = {}, .positions = intervention == 2 ? 100 : 0};
  const std::int64_t rows = std::max<std::int64_t>(vector.positions, 1);
  for (std::int64_t i = 0; i < rows * schedule_model()->config().hidden_size; ++i) {
    vector.values.push_back(i % 2 == 0 ? 2.0f : -1.0f);
  }
  engine.steer(intervention == 1 || intervention == 2 ? std::vector{vector}
                                                      : std::vector<SteeringVector>{});
  engine.ablate(intervention == 3 ? Ablation{.heads = {{0, {1}}}, .mlps = {1}} : Ablation{});
}

Call random_call(Random& random, int longest) {
  Call call;
  const int count = random.one_in(3) ? random.between(2, 12) : 1;
  for (int i = 0; i < count; ++i) call.requests.push_back(random_request(random, longest));
  if (random.one_in(6)) call.cancel_after = random.below(30);
  if (random.one_in(2)) call.delay_us = random.below(3000);
  if (random.one_in(3)) call.intervention = random.between(1, 3);
  return call;
}

std::unique_ptr<Generation> start(Engine& engine, const Call& call) {
  static std::mutex others;  // do not intervene in between
  const std::lock_guard lock(others);
  intervene(engine, call.intervention);
  return engine.start(call.requests);
}

void run(Engine& engine, Call& call) {
  std::this_thread::sleep_for(std::chrono::microseconds(call.delay_us));
  const auto generation = start(engine, call);
  for (int events = 0;; ++events) {
    if (events == call.cancel_after) generation->cancel();
    if (!generation->next()) break;
  }
  call.results = generation->results();
}

void expect_same(const GenerateResult& result, const GenerateResult& alone) {
  const bool cancelled = result.finish_reason == FinishReason::cancelled;
  if (!cancelled) {
    EXPECT_EQ(result.tokens, alone.tokens);
    EXPECT_EQ(result.text, alone.text);
    EXPECT_EQ(result.finish_reason, alone.finish_reason);
    EXPECT_EQ(result.prompt_scores.size(), alone.prompt_scores.size());
  }
  ASSERT_LE(result.tokens.size(), alone.tokens.size());
  EXPECT_TRUE(std::equal(result.tokens.begin(), result.tokens.end(), alone.tokens.begin()));
  EXPECT_EQ(result.sampled.size(), alone.sampled.empty() ? 0u : result.tokens.size());
  for (std::size_t i = 0; i < result.sampled.size(); ++i) {
    ASSERT_EQ(result.sampled[i].logprob, alone.sampled[i].logprob);
    ASSERT_EQ(result.sampled[i].top.size(), alone.sampled[i].top.size());
    for (std::size_t t = 0; t < result.sampled[i].top.size(); ++t) {
      ASSERT_EQ(result.sampled[i].top[t].logprob, alone.sampled[i].top[t].logprob);
    }
  }
  for (std::size_t i = 0; i < result.prompt_scores.size(); ++i) {
    ASSERT_EQ(result.prompt_scores[i].logprob, alone.prompt_scores[i].logprob);
  }
}

// Each sample as a request of its own, in an engine without a cache.
void expect_as_alone(Engine& plain, const Call& call) {
  std::size_t index = 0;
  intervene(plain, call.intervention);
  for (GenerateRequest request : call.requests) {
    const std::int32_t samples = std::exchange(request.n, 1);
    for (std::int32_t sample = 0; sample < samples; ++sample) {
      const GenerateResult alone = plain.generate(request);
      SCOPED_TRACE(testing::Message()
                   << "result " << index << ", prompt of " << request.prompt_tokens.size()
                   << " tokens, sample " << sample);
      expect_same(call.results.at(index++), alone);
      ++request.sampling.seed;
    }
  }
  EXPECT_EQ(index, call.results.size());
}

int number_of(const char* variable, int otherwise) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoi(text);
}

TEST(RandomSchedules, EachTextIsTheOneAlone) {
  const auto plain = schedule_engine(1000, {.max_sequences = 1, .prefix_cache = false});
  ServingStatistics all;
  const int count = number_of("CLUSTERFUSION_SCHEDULES", 200);
  const int first = number_of("CLUSTERFUSION_FIRST_SCHEDULE", 0);
  for (int schedule = first; schedule < first + count; ++schedule) {
    SCOPED_TRACE(testing::Message() << "schedule " << schedule);
    Random random(static_cast<unsigned>(schedule));
    // From what one long text needs to plenty.
    const bool is_tight = random.one_in(2);
    const int longest = is_tight ? 150 : 2000;
    const std::int64_t pages = is_tight ? random.between(6, 12) : random.between(35, 400);
    const auto engine =
        schedule_engine(pages, {.max_sequences = random.one_in(3) ? random.between(1, 8) : 256,
                                .prefix_cache = !random.one_in(4)});
    std::vector<Call> calls(static_cast<std::size_t>(random.between(1, 12)));
    std::size_t sequences = 0;
    for (Call& call : calls) {
      call = random_call(random, longest);
      for (const GenerateRequest& request : call.requests)
        sequences += static_cast<std::size_t>(request.n);
      if (sequences > 40) call.requests.resize(1);
    }
    std::vector<std::thread> threads;
    for (Call& call : calls) threads.emplace_back([&] { run(*engine, call); });
    for (std::thread& thread : threads) thread.join();
    for (const Call& call : calls) expect_as_alone(*plain, call);
    const ServingStatistics statistics = engine->serving_statistics();
    EXPECT_EQ(statistics.sequences_active, 0);
    EXPECT_EQ(statistics.sequences_waiting, 0);
    EXPECT_EQ(statistics.kv_pages_in_use, statistics.kv_pages_cached) << "nothing leaks";
    all.preemptions += statistics.preemptions;
    all.prefix_hit_tokens += statistics.prefix_hit_tokens;
    all.prompt_tokens += statistics.prompt_tokens;
    if (HasFatalFailure() || HasNonfatalFailure()) return;
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
