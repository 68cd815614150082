#include "engine/random_requests.hpp"

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

namespace clusterfusion::test {

namespace {

std::shared_ptr<const Model> model_for_schedules(ModelConfig config) {
  config.vocab_size = kVocabSize;
  config.num_layers = 2;
  config.max_positions = 4096;
  config.bos_token.reset();
  config.eos_tokens = {kEndOfText};
  return make_random_model(config);
}

}  // namespace

ScheduleDevice& schedule_device() {
  static ScheduleDevice device;
  return device;
}

std::shared_ptr<const Model> schedule_model() {
  static const std::shared_ptr<const Model> model = model_for_schedules(schedule_device().model);
  return model;
}

std::shared_ptr<const Model> schedule_llama() {
  static const std::shared_ptr<const Model> model = model_for_schedules(schedule_device().llama);
  return model;
}

std::unique_ptr<Backend> schedule_backend(const std::shared_ptr<const Model>& model,
                                          BackendOptions options) {
  options.threads = 1;
  return schedule_device().make_backend(model, options);
}

namespace {

// Asked once: a device may take its time to be opened.
std::int64_t page_bytes_of(const std::shared_ptr<const Model>& model) {
  static std::map<const Model*, std::int64_t> known;
  const auto [entry, is_new] = known.try_emplace(model.get(), 0);
  if (is_new) entry->second = schedule_backend(model, {})->info().page_bytes();
  return entry->second;
}

}  // namespace

std::unique_ptr<Engine> schedule_engine(std::int64_t kv_pages, SchedulerOptions scheduling,
                                        std::int64_t positions,
                                        const std::shared_ptr<const Model>& model) {
  BackendOptions options;
  options.max_positions = positions;
  options.kv_bytes = kv_pages * page_bytes_of(model);
  return make_engine(model, byte_tokenizer(), schedule_backend(model, options), "a test", {},
                     std::move(scheduling));
}

namespace {

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

}  // namespace

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

void intervene(Engine& engine, int intervention) {
  SteeringVector vector{.layer = 1, .values = {}, .positions = intervention == 2 ? 100 : 0};
  const std::int64_t rows = std::max<std::int64_t>(vector.positions, 1);
  for (std::int64_t i = 0; i < rows * engine.model().config().hidden_size; ++i) {
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

namespace {

std::unique_ptr<Generation> start(Engine& engine, const Call& call) {
  static std::mutex others;  // do not intervene in between
  const std::lock_guard lock(others);
  intervene(engine, call.intervention);
  return engine.start(call.requests);
}

}  // namespace

void run(Engine& engine, Call& call) {
  std::this_thread::sleep_for(std::chrono::microseconds(call.delay_us));
  const auto generation = start(engine, call);
  for (int events = 0;; ++events) {
    if (events == call.cancel_after) generation->cancel();
    if (!generation->next()) break;
  }
  call.results = generation->results();
}

void run_together(Engine& engine, std::span<Call> calls) {
  std::vector<std::thread> threads;
  for (Call& call : calls) threads.emplace_back([&] { run(engine, call); });
  for (std::thread& thread : threads) thread.join();
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

ServingStatistics expect_idle(const Engine& engine) {
  // Callers may hear of the last step before the scheduler has counted it.
  constexpr std::chrono::seconds kPatience{30};
  const auto start = std::chrono::steady_clock::now();
  ServingStatistics statistics = engine.serving_statistics();
  while (statistics.sequences_active > 0 && std::chrono::steady_clock::now() < start + kPatience) {
    std::this_thread::yield();
    statistics = engine.serving_statistics();
  }
  EXPECT_EQ(statistics.sequences_active, 0);
  EXPECT_EQ(statistics.sequences_waiting, 0);
  EXPECT_EQ(statistics.kv_pages_in_use, statistics.kv_pages_cached) << "nothing leaks";
  return statistics;
}

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

}  // namespace clusterfusion::test
