// Time of the sampling kernel that follows a decode step where filters, a repetition penalty or
// log-probabilities are asked for, on random logits of the size of Pythia's vocabulary.
//   sample_time [--vocab 50304] [--repeats 200]
// Prints one JSON document on stdout, a table on stderr.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/sampling/device_sampler.hpp"
#include "shape_arguments.hpp"

using namespace clusterfusion;
using namespace clusterfusion::benchmark;
using cuda::check;

namespace {

// Steps between two looks at the clock, as the backend enqueues them.
constexpr int kSteps = 16;

struct Setting {
  const char* name;
  SamplingParams params;
};

const Setting kSettings[] = {
    {"greedy, penalty 1.2", {.repetition_penalty = 1.2f}},
    {"top_k 50", {.temperature = 0.8f, .top_k = 50}},
    {"top_p 0.9", {.temperature = 0.8f, .top_p = 0.9f}},
    {"top_k 50, top_p 0.95", {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f}},
    {"min_p 0.05", {.temperature = 0.8f, .min_p = 0.05f}},
    {"temperature 1, penalty 1.2", {.temperature = 1.0f, .repetition_penalty = 1.2f}},
    {"temperature 1, 5 log-probabilities", {.temperature = 1.0f, .num_logprobs = 5}},
    {"everything",
     {.temperature = 0.8f,
      .top_k = 50,
      .top_p = 0.95f,
      .min_p = 0.01f,
      .repetition_penalty = 1.2f,
      .num_logprobs = 100}},
};

// Logits as a model's: a few tokens stand out; or all alike, the worst case for the histograms.
struct Distribution {
  const char* name;
  float spread;
};
constexpr Distribution kDistributions[] = {{"spread 3", 3.0f}, {"spread 1", 1.0f}, {"equal", 0.0f}};

struct EventDeleter {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDeleter>;

Event make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), "creating an event");
  return Event(event);
}

class Timer {
 public:
  Timer(std::int64_t vocab, int repeats)
      : vocab_(vocab),
        repeats_(repeats),
        sampler_(vocab, kSteps),
        logits_((vocab + 3) / 4 * 16, "logits"),
        begin_(make_event()),
        end_(make_event()) {}

  void fill(float spread) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> logits(static_cast<std::size_t>(vocab_));
    for (float& logit : logits) logit = spread * normal(random);
    check(cudaMemcpy(logits_.as<>(), logits.data(), logits.size() * 4, cudaMemcpyHostToDevice),
          "sending logits");
  }

  // Microseconds a token of each repeat, sorted; the first is for warming up.
  std::vector<double> measure(const SamplingParams& params) {
    std::vector<double> microseconds;
    for (int repeat = 0; repeat <= repeats_; ++repeat) {
      sampler_.begin(params, std::vector<TokenId>{1, 2, 3}, 3 + repeat * kSteps, nullptr);
      check(cudaEventRecord(begin_.get(), nullptr), "recording an event");
      for (int step = 0; step < kSteps; ++step) sampler_.choose(logits_.as<float>(), nullptr);
      check(cudaEventRecord(end_.get(), nullptr), "recording an event");
      sampler_.fetch(nullptr);
      check(cudaStreamSynchronize(nullptr), "choosing tokens");
      float milliseconds = 0;
      check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "reading events");
      if (repeat > 0) microseconds.push_back(1000.0 * milliseconds / kSteps);
    }
    std::sort(microseconds.begin(), microseconds.end());
    return microseconds;
  }

 private:
  std::int64_t vocab_;
  int repeats_;
  cuda::DeviceSampler sampler_;
  cuda::DeviceMemory logits_;
  Event begin_, end_;
};

std::string measure(std::int64_t vocab, int repeats) {
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
  Timer timer(vocab, repeats);
  std::vector<std::string> rows;
  for (const Distribution& distribution : kDistributions) {
    timer.fill(distribution.spread);
    for (const Setting& setting : kSettings) {
      const std::vector<double> times = timer.measure(setting.params);
      const double median = times[times.size() / 2];
      std::fprintf(stderr, "%-8s  %-36s %6.2f us (%.2f to %.2f)\n", distribution.name, setting.name,
                   median, times.front(), times.back());
      rows.push_back(fmt::format(
          R"({{"logits": "{}", "setting": "{}", "us": {:.3f}, "low": {:.3f}, "high": {:.3f}}})",
          distribution.name, setting.name, median, times.front(), times.back()));
    }
  }
  return fmt::format(R"({{"device": "{}, {} SMs", "vocab": {}, "repeats": {}, "steps": {}, )"
                     R"("kernels": [{}]}})",
                     properties.name, properties.multiProcessorCount, vocab, repeats, kSteps,
                     fmt::join(rows, ",\n  "));
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark("sample_time", [&] {
    ShapeArguments arguments(argc, argv);
    const auto vocab = arguments.numbers("--vocab", {50304});
    const auto repeats = arguments.numbers("--repeats", {200});
    if (repeats.size() != 1 || repeats[0] < 1 || repeats[0] > 1'000'000)
      throw std::invalid_argument("--repeats: expected one number of 1 to 1000000");
    std::vector<std::string> results;
    for (const std::int64_t size : vocab) {
      if (size < 1 || size > 10'000'000)
        throw std::invalid_argument("--vocab: expected numbers of 1 to 10000000");
      results.push_back(measure(size, static_cast<int>(repeats[0])));
    }
    return results;
  });
}
