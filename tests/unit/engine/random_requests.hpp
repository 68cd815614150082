// Random requests of callers that come, go and cancel, on a small model.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int end) { return static_cast<int>(engine_() % static_cast<unsigned>(end)); }
  int between(int least, int most) { return least + below(most - least + 1); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  std::mt19937 engine_;
};

// Where the schedules run: on the CPU, unless a program says otherwise before its first test
// (tests/gpu/schedules_on_gpu.cpp).
struct ScheduleDevice {
  std::function<std::unique_ptr<Backend>(std::shared_ptr<const Model>, const BackendOptions&)>
      make_backend = make_cpu_backend;
  // Shapes, but for vocabulary, layers and context.
  ModelConfig model = small_config();
  ModelConfig llama = small_llama_config();
};
ScheduleDevice& schedule_device();

// kVocabSize tokens, two layers.
std::shared_ptr<const Model> schedule_model();

inline constexpr std::int64_t kLongestSchedule = 2100;  // positions

// Likewise, of the Llama layout.
std::shared_ptr<const Model> schedule_llama();

// On the device, with one thread.
std::unique_ptr<Backend> schedule_backend(const std::shared_ptr<const Model>& model,
                                          BackendOptions options);

// Of the model, with so many pages, one thread, and the longest context `positions`.
std::unique_ptr<Engine> schedule_engine(
    std::int64_t kv_pages, SchedulerOptions scheduling, std::int64_t positions = kLongestSchedule,
    const std::shared_ptr<const Model>& model = schedule_model());

GenerateRequest random_request(Random& random, int longest);

// What one caller does.
struct Call {
  std::vector<GenerateRequest> requests;
  int cancel_after = -1;  // so many events; -1: never
  int delay_us = 0;
  int intervention = 0;  // see intervene()
  std::vector<GenerateResult> results = {};
};

// 0 for none; the others, up to 3, differ.
void intervene(Engine& engine, int intervention);

// `longest`: tokens of a prompt.
Call random_call(Random& random, int longest);
void run(Engine& engine, Call& call);
// All at once, each on a thread of its own.
void run_together(Engine& engine, std::span<Call> calls);

// Tokens, texts, finish reasons and scores, bit for bit, as far as a result goes that was
// cancelled.
void expect_same(const GenerateResult& result, const GenerateResult& alone);
// The engine's statistics once it has nothing left to do, and nothing may have leaked.
ServingStatistics expect_idle(const Engine& engine);
// Each sample as a request of its own, in `plain`.
void expect_as_alone(Engine& plain, const Call& call);

}  // namespace clusterfusion::test
