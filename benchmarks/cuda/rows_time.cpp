// Time a decode step of many sequences, beside the read ceiling that the same process measures and
// beside one sequence by the kernel for a single row.
//   rows_time [--rows 1,2,4,8,16,32] [--contexts 128] [--repeats 7] [--warm-up 3] [--one-sequence]
//             [SHAPE ...]
// A time is that of 128 greedy tokens of each sequence, from the host, at about the same context:
// 16 at a time, then the sequences are cut back. Weights are random float16 (random_model.hpp).
// With --one-sequence all rows are tokens of one sequence, which a step verifies.
// "share" is what a step must read (weights once, keys and values of every sequence) over the time,
// of the ceiling. Prints one JSON document on stdout, a table on stderr.
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

constexpr int kTokens = 128;

struct Settings {
  std::vector<std::int64_t> rows, contexts;
  int repeats = 7;
  double warm_up_seconds = 3.0;
  bool one_sequence = false;
};

struct Time {
  double median, low, high;
};

// A sequence of so many tokens, which are others for each `number`.
SequenceId begin_sequence(Backend& backend, std::int64_t tokens, std::int64_t number,
                          const Shape& shape) {
  std::vector<TokenId> prompt(tokens);
  for (std::int64_t i = 0; i < tokens; ++i)
    prompt[i] = static_cast<TokenId>((i * 7919 + number * 104729) % shape.vocab);
  const SequenceId id = backend.create_sequence({});
  backend.prefill(id, prompt, {});
  return id;
}

// Runs `decode`, which returns milliseconds a step, first for as long as it takes to warm up.
template <typename Decode>
Time time_of_repeats(const Decode& decode, const Settings& settings, double warm_up_seconds) {
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  do decode();
  while (seconds() < warm_up_seconds);
  std::vector<double> times;
  for (int repeat = 0; repeat < settings.repeats; ++repeat) times.push_back(decode());
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

// Of steps that verify one sequence's tokens.
Time time_of_one_sequence(Backend& backend, std::int64_t rows, std::int64_t context,
                          const Shape& shape, const Settings& settings, double warm_up_seconds) {
  const std::int64_t start = std::min(context, backend.info().max_positions - rows);
  const SequenceId id = begin_sequence(backend, start, 0, shape);
  const auto verify = [&] {
    const auto begin = std::chrono::steady_clock::now();
    for (int step = 0; step < kTokens; ++step) {
      Proposal proposal{id, std::vector<TokenId>(rows, 5)};
      backend.verify({&proposal, 1});
      backend.truncate(id, start);
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    return took.count() / kTokens;
  };
  const Time time = time_of_repeats(verify, settings, warm_up_seconds);
  backend.release_sequence(id);
  return time;
}

Time time_of(Backend& backend, std::int64_t rows, std::int64_t context, const Shape& shape,
             const Settings& settings, double warm_up_seconds) {
  const std::int32_t steps = backend.info().decode_ahead;
  const std::int64_t start = std::min(context, backend.info().max_positions - steps);
  std::vector<SequenceId> ids;
  for (std::int64_t row = 0; row < rows; ++row)
    ids.push_back(begin_sequence(backend, start, row, shape));
  const std::vector<TokenId> inputs(rows, 5);
  std::vector<SampledToken> sampled(rows * steps);
  const auto decode = [&] {
    const auto begin = std::chrono::steady_clock::now();
    for (int done = 0; done < kTokens; done += steps) {
      for (const SequenceId id : ids) backend.truncate(id, start);
      backend.decode(ids, inputs, steps, sampled, {});
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    return took.count() / kTokens;
  };
  const Time time = time_of_repeats(decode, settings, warm_up_seconds);
  for (const SequenceId id : ids) backend.release_sequence(id);
  return time;
}

std::string measure(const Shape& shape, const Settings& settings) {
  const auto model = std::make_shared<SharedModel>(shape);
  std::string results;
  double ceiling = 0;
  double warm_up = settings.warm_up_seconds;
  // The kernel for a single row first: then its memory is given back.
  for (const bool one_row : {true, false}) {
    BackendOptions options;
    options.mode = one_row ? DecodeMode::latency : DecodeMode::throughput;
    const auto backend = make_cuda_backend(model, options);
    ceiling = std::max(ceiling, backend->measure_read_ceiling());
    for (const std::int64_t context : settings.contexts)
      for (const std::int64_t rows : settings.rows) {
        if (one_row && rows > 1) continue;
        const auto& time_of_rows = settings.one_sequence ? time_of_one_sequence : time_of;
        const Time time = time_of_rows(*backend, rows, context, shape, settings, warm_up);
        warm_up = 0.5;
        const double bytes = static_cast<double>(model->bytes_per_token()) +
                             static_cast<double>(backend->info().kv_bytes_per_position * context *
                                                 (settings.one_sequence ? 1 : rows));
        const double share = bytes / (time.median * 1e-3) / ceiling;
        std::fprintf(stderr, "%-12s %s rows %3ld context %5ld: %.4f ms (%.4f to %.4f), %.1f %%\n",
                     shape.name, one_row ? "one-row kernel," : "rows kernel,   ",
                     static_cast<long>(rows), static_cast<long>(context), time.median, time.low,
                     time.high, 100 * share);
        results += fmt::format(
            R"({}{{"kernel": "{}", "rows": {}, "context": {}, "ms_per_step": {:.5f}, "low": {:.5f}, "high": {:.5f}, "ceiling_share": {:.4f}}})",
            results.empty() ? "" : ", ", one_row ? "one row" : "rows", rows, context, time.median,
            time.low, time.high, share);
      }
  }
  return fmt::format(R"({{"model": "{}", "read_ceiling_bytes_per_second": {:.4e}, "times": [{}]}})",
                     shape.name, ceiling, results);
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark("rows_time", [&] {
    ShapeArguments arguments(argc, argv);
    Settings settings;
    settings.rows = arguments.numbers("--rows", {1, 2, 4, 8, 16, 32});
    settings.contexts = arguments.numbers("--contexts", {128});
    settings.repeats = static_cast<int>(arguments.numbers("--repeats", {7}).at(0));
    settings.warm_up_seconds = static_cast<double>(arguments.numbers("--warm-up", {3}).at(0));
    settings.one_sequence = arguments.flag("--one-sequence");
    std::vector<std::string> results;
    for (const Shape* shape : arguments.shapes()) results.push_back(measure(*shape, settings));
    return results;
  });
}
