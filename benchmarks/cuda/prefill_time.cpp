// Time of a prompt on the GPU, from the host to its first token, for Pythia's shapes.
//   prefill_time [--tokens 128,512,...] [SHAPE ...]      default: pythia-2.8b
// Weights are random float16. Prints one JSON document on stdout, a table on stderr.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "random_model.hpp"
#include "shape_arguments.hpp"

using namespace clusterfusion;
using namespace clusterfusion::benchmark;

namespace {

constexpr int kRepeats = 15;

// Multiplications and additions of a prompt: the layers' matrices for every token, attention for
// every pair of a query and a key that it sees, the LM head once.
double floating_point_operations(const Shape& shape, double tokens) {
  const double hidden = static_cast<double>(shape.hidden);
  const double layer = 2 * 12 * hidden * hidden * tokens + 4 * hidden * tokens * (tokens + 1) / 2;
  return static_cast<double>(shape.layers) * layer + 2 * hidden * static_cast<double>(shape.vocab);
}

struct Milliseconds {
  double first;                 // while CUDA loads kernels
  double second;                // which makes a CUDA graph of a short prompt
  std::vector<double> repeats;  // sorted
};

Milliseconds measure(Backend& backend, const Shape& shape, std::int64_t tokens) {
  std::vector<TokenId> prompt(static_cast<std::size_t>(tokens));
  for (std::int64_t i = 0; i < tokens; ++i)
    prompt[i] = static_cast<TokenId>(i * 7919 % shape.vocab);
  const SequenceId id = backend.create_sequence({});
  backend.reserve(id, tokens);
  const auto prefill = [&] {
    SampledToken sampled;
    PrefillOutput output;
    output.sampled = &sampled;
    const auto begin = std::chrono::steady_clock::now();
    backend.prefill(id, prompt, output);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    backend.truncate(id, 0);
    return took.count();
  };
  Milliseconds result{.first = prefill(), .second = prefill(), .repeats = {}};
  for (int repeat = 0; repeat < kRepeats; ++repeat) result.repeats.push_back(prefill());
  backend.release_sequence(id);
  std::sort(result.repeats.begin(), result.repeats.end());
  return result;
}

std::string measure(const Shape& shape, const std::vector<std::int64_t>& counts) {
  const auto backend = make_cuda_backend(std::make_shared<SharedModel>(shape), {});
  std::string rows;
  for (const std::int64_t tokens : counts) {
    const auto [first, second, times] = measure(*backend, shape, tokens);
    const double median = times[times.size() / 2];
    const double rate =
        floating_point_operations(shape, static_cast<double>(tokens)) / median / 1e9;
    std::fprintf(stderr,
                 "%-12s %5ld tokens: %.3f ms (%.3f to %.3f; the first %.1f, the second %.1f), %.0f "
                 "TFLOP/s\n",
                 shape.name, static_cast<long>(tokens), median, times.front(), times.back(), first,
                 second, rate);
    rows += fmt::format(
        R"({}{{"tokens": {}, "ms": {:.4f}, "low": {:.4f}, "high": {:.4f}, "first": {:.2f}, "second": {:.2f}, "tflops": {:.1f}}})",
        rows.empty() ? "" : ", ", tokens, median, times.front(), times.back(), first, second, rate);
  }
  return fmt::format(R"({{"model": "{}", "device": "{}", "prompts": [{}]}})", shape.name,
                     backend->info().device, rows);
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark("prefill_time", [&] {
    ShapeArguments arguments(argc, argv);
    const auto counts = arguments.numbers("--tokens", {128, 512, 2048});
    std::vector<std::string> results;
    for (const Shape* shape : arguments.shapes()) results.push_back(measure(*shape, counts));
    return results;
  });
}
