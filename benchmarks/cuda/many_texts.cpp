// Many texts at once through the engine: scores, prompts, and whole generations.
//   many_texts [--texts 1024] [--text-tokens 64] [--prompts 8] [--prompt-tokens 1024]
//              [--generations 1024] [--begin 128] [--new 128] [--repeats 5] [--latency] [--cpu]
//              [SHAPE ...]
// - scoring: Engine::score() of `texts` texts of `text-tokens` tokens each, tokens a second;
// - prefill: milliseconds until `prompts` prompts of `prompt-tokens` tokens have their first token;
// - generation: new tokens a second of `generations` prompts of `begin` tokens, `new` more each.
// Mode throughput, or with --latency the other one; with --cpu on the CPU. Each time is from the
// host, after a first run that does not count; texts differ from each other and from repeat to
// repeat, and the prefix cache is off. Weights are random float16 (random_model.hpp). Prints one
// JSON document on stdout, a table on stderr.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "random_model.hpp"
#include "shape_arguments.hpp"

using namespace clusterfusion;
using namespace clusterfusion::benchmark;

namespace {

struct Settings {
  bool on_cpu = false, latency = false;
  std::int64_t texts, text_tokens, prompts, prompt_tokens, generations, begin, new_tokens;
  int repeats;
};

class Texts {
 public:
  explicit Texts(const Shape& shape) : vocab_(static_cast<std::uint64_t>(shape.vocab)) {}

  // Never the same again.
  std::vector<std::vector<TokenId>> next(std::int64_t count, std::int64_t tokens) {
    std::vector<std::vector<TokenId>> texts(static_cast<std::size_t>(count));
    for (std::vector<TokenId>& text : texts) {
      for (std::int64_t i = 0; i < tokens; ++i) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        text.push_back(static_cast<TokenId>((state_ >> 33) % vocab_));
      }
    }
    return texts;
  }

 private:
  std::uint64_t vocab_;
  std::uint64_t state_ = 1;
};

struct Seconds {
  double median, low, high;
};

// `prepare` makes what `run` takes, and its time does not count.
template <typename Prepare, typename Run>
Seconds time_of(int repeats, const Prepare& prepare, const Run& run) {
  std::vector<double> seconds;
  for (int repeat = 0; repeat <= repeats; ++repeat) {
    auto given = prepare();
    const auto begin = std::chrono::steady_clock::now();
    run(std::move(given));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (repeat > 0) seconds.push_back(took.count());
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
}

std::vector<GenerateRequest> requests_of(std::vector<std::vector<TokenId>> prompts,
                                         std::int64_t new_tokens) {
  std::vector<GenerateRequest> requests(prompts.size());
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    requests[i].prompt_tokens = std::move(prompts[i]);
    requests[i].max_new_tokens = new_tokens;
    requests[i].ignore_eos = true;
  }
  return requests;
}

std::string report(const Shape& shape, const char* what, const Seconds& seconds, double tokens) {
  std::fprintf(stderr, "%-12s %-10s %9.2f ms (%.2f to %.2f), %.0f tokens/s\n", shape.name, what,
               seconds.median * 1e3, seconds.low * 1e3, seconds.high * 1e3,
               tokens / seconds.median);
  return fmt::format(
      R"({{"what": "{}", "ms": {:.3f}, "low": {:.3f}, "high": {:.3f}, "tokens_per_second": {:.1f}}})",
      what, seconds.median * 1e3, seconds.low * 1e3, seconds.high * 1e3, tokens / seconds.median);
}

std::string measure(const Shape& shape, const Settings& s) {
  EngineOptions options;
  options.device = s.on_cpu ? "cpu" : "cuda";
  options.mode = s.latency ? DecodeMode::latency : DecodeMode::throughput;
  options.prefix_cache = false;
  const auto engine = Engine::open(std::make_shared<SharedModel>(shape), nullptr, options);
  Texts texts(shape);
  const auto generate = [&](std::int64_t count, std::int64_t begin, std::int64_t new_tokens) {
    return time_of(
        s.repeats, [&] { return requests_of(texts.next(count, begin), new_tokens); },
        [&](std::vector<GenerateRequest> requests) { engine->generate(std::move(requests)); });
  };
  const Seconds scoring = time_of(
      s.repeats, [&] { return texts.next(s.texts, s.text_tokens); },
      [&](const std::vector<std::vector<TokenId>>& given) { engine->score(given); });
  std::vector<std::string> results;
  results.push_back(
      report(shape, "scoring", scoring, static_cast<double>(s.texts * s.text_tokens)));
  results.push_back(report(shape, "prefill", generate(s.prompts, s.prompt_tokens, 1),
                           static_cast<double>(s.prompts * s.prompt_tokens)));
  results.push_back(report(shape, "generation", generate(s.generations, s.begin, s.new_tokens),
                           static_cast<double>(s.generations * s.new_tokens)));
  return fmt::format(R"({{"model": "{}", "device": "{}", "mode": "{}", "results": [{}]}})",
                     shape.name, engine->info().device_description, name_of(options.mode),
                     fmt::join(results, ", "));
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark("many_texts", [&] {
    ShapeArguments arguments(argc, argv);
    const auto number = [&](const char* option, std::int64_t otherwise) {
      return arguments.numbers(option, {otherwise}).at(0);
    };
    Settings s;
    s.on_cpu = arguments.flag("--cpu");
    s.latency = arguments.flag("--latency");
    s.texts = number("--texts", 1024);
    s.text_tokens = number("--text-tokens", 64);
    s.prompts = number("--prompts", 8);
    s.prompt_tokens = number("--prompt-tokens", 1024);
    s.generations = number("--generations", 1024);
    s.begin = number("--begin", 128);
    s.new_tokens = number("--new", 128);
    s.repeats = static_cast<int>(number("--repeats", 5));
    std::vector<std::string> results;
    for (const Shape* shape : arguments.shapes()) results.push_back(measure(*shape, s));
    return results;
  });
}
