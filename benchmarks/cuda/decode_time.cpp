// Time a token of the streaming decode kernel, for the shapes of known models and several contexts,
// beside the read ceiling that the same process measures.
//   decode_time [--contexts 16,128,...] [--repeats 7] [--warm-up 3] [--phases]
//               [--bfloat16] [SHAPE ...]
//   default: contexts 16,128,1024,2047 of pythia-2.8b
// Before the first time it decodes for as many seconds as --warm-up says: a card at its power limit
// lowers its clock only after a second or so, first too far.
// A time is that of 256 greedy tokens, from the host, at about the same context: 16 at a time, then
// the sequence is cut back. --phases prints when the phases of a layer end, in the median.
// Weights are random (float16; bfloat16 of Llama's relatives, or if asked); all layers come from
// one host matrix, but lie apart on the device. Prints one JSON document on stdout, a table on
// stderr.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "random_model.hpp"
#include "shape_arguments.hpp"

using namespace clusterfusion;
using namespace clusterfusion::benchmark;

namespace {

constexpr int kTokens = 256;

struct Summary {
  double median, low, high;
};
Summary summary(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

double decode_bytes(const Model& model, const Backend& backend, std::int64_t context) {
  return static_cast<double>(model.bytes_per_token()) +
         static_cast<double>(backend.info().kv_bytes_per_position * context);
}

// Medians over SMs and inner layers of when each phase ends after its layer's first SM began, and
// of how long it takes, to stderr.
void print_phases(Backend& backend, SequenceId id, const Shape& shape) {
  const auto events = backend.record_timeline(id, 5);
  std::map<std::int32_t, std::int64_t> begin;
  for (const TimelineEvent& event : events) {
    const auto [at, fresh] = begin.emplace(event.layer, event.begin_ns);
    if (!fresh) at->second = std::min(at->second, event.begin_ns);
  }
  std::vector<std::string_view> names;
  std::map<std::string_view, std::vector<double>> took, ends;
  for (const TimelineEvent& event : events) {
    if (event.layer >= 0 && (event.layer < 2 || event.layer + 1 >= shape.layers)) continue;
    const std::string_view name = event.phase;
    if (!took.contains(name)) names.push_back(name);
    took[name].push_back(static_cast<double>(event.end_ns - event.begin_ns) * 1e-3);
    ends[name].push_back(static_cast<double>(event.end_ns - begin[event.layer]) * 1e-3);
  }
  for (const std::string_view name : names) {
    std::sort(took[name].begin(), took[name].end());
    std::sort(ends[name].begin(), ends[name].end());
    const auto at = [](const std::vector<double>& v, double q) {
      return v[static_cast<std::size_t>(q * static_cast<double>(v.size() - 1))];
    };
    std::fprintf(
        stderr, "    %-20s %6zu times %6.2f us (%.2f to %.2f), ends %6.2f (%.2f to %.2f)\n",
        std::string(name).c_str(), took[name].size(), at(took[name], 0.5), at(took[name], 0.05),
        at(took[name], 0.95), at(ends[name], 0.5), at(ends[name], 0.05), at(ends[name], 0.95));
  }
}

struct Settings {
  std::vector<std::int64_t> contexts;
  int repeats = 7;
  double warm_up_seconds = 3.0;
  bool phases = false;
  std::optional<DType> dtype;  // if not the shape's own
};

std::string measure(const Shape& shape, const Settings& settings) {
  const auto model = std::make_shared<SharedModel>(shape, settings.dtype);
  const auto backend = make_cuda_backend(model, {});
  const double ceiling = backend->measure_read_ceiling();
  std::string rows;
  const std::int32_t steps = backend->info().decode_ahead;
  double warm_up_ms = settings.warm_up_seconds * 1e3;
  for (const std::int64_t context : settings.contexts) {
    const std::int64_t start = std::min(context, backend->info().max_positions - steps);
    const SequenceId id = backend->create_sequence({});
    std::vector<TokenId> prompt(start);
    for (std::int64_t i = 0; i < start; ++i)
      prompt[i] = static_cast<TokenId>(i * 7919 % shape.vocab);
    backend->prefill(id, prompt, {});
    std::vector<SampledToken> sampled(steps);
    const auto decode = [&] {
      const auto begin = std::chrono::steady_clock::now();
      for (int done = 0; done < kTokens; done += steps) {
        backend->truncate(id, start);
        backend->decode(std::vector{id}, std::vector<TokenId>{5}, steps, sampled, {});
      }
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - begin;
      return took.count();
    };
    decode();
    while (warm_up_ms > 0) warm_up_ms -= decode();
    std::vector<double> milliseconds;
    for (int repeat = 0; repeat < settings.repeats; ++repeat)
      milliseconds.push_back(decode() / kTokens);
    backend->truncate(id, start);
    if (settings.phases) print_phases(*backend, id, shape);
    backend->release_sequence(id);
    const Summary time = summary(milliseconds);
    const double share =
        decode_bytes(*model, *backend, start + steps / 2) / (time.median * 1e-3) / ceiling;
    std::fprintf(stderr,
                 "%-12s context %5ld: %.4f ms a token (%.4f to %.4f), %.1f %% of %.3f TB/s\n",
                 shape.name, static_cast<long>(context), time.median, time.low, time.high,
                 100 * share, ceiling * 1e-12);
    rows += fmt::format(
        R"({}{{"context": {}, "ms_per_token": {:.5f}, "low": {:.5f}, "high": {:.5f}, "ceiling_share": {:.4f}}})",
        rows.empty() ? "" : ", ", context, time.median, time.low, time.high, share);
  }
  return fmt::format(
      R"({{"model": "{}", "dtype": "{}", "device": "{}", "read_ceiling_bytes_per_second": {:.4e}, "contexts": [{}]}})",
      shape.name, name_of(model->config().dtype), backend->info().device, ceiling, rows);
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark("decode_time", [&] {
    ShapeArguments arguments(argc, argv);
    Settings settings;
    settings.contexts = arguments.numbers("--contexts", {16, 128, 1024, 2047});
    settings.repeats = static_cast<int>(arguments.numbers("--repeats", {7}).at(0));
    settings.warm_up_seconds = static_cast<double>(arguments.numbers("--warm-up", {3}).at(0));
    settings.phases = arguments.flag("--phases");
    if (arguments.flag("--bfloat16")) settings.dtype = DType::bfloat16;
    std::vector<std::string> results;
    for (const Shape* shape : arguments.shapes()) results.push_back(measure(*shape, settings));
    return results;
  });
}
