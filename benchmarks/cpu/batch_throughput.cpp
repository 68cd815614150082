// Tokens per second of decode steps on the CPU, by the number of sequences that share them. Rounds
// of all numbers take turns, so that what else the machine does meets all of them; the medians of
// the steps go to stdout as JSON. With one thread it is its processor time that counts.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <ctime>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "backend/backend.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

struct Arguments {
  std::string model;
  int threads = 0;
  int rounds = 5;
  int steps = 4;
  int context = 16;
  std::vector<int> batches = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 33, 48, 64};
};

// Wall-clock seconds, or of processor time, in which other programs count less.
double seconds_now(bool of_processor) {
  timespec now{};
  clock_gettime(of_processor ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + std::ssize(values) / 2);
  return values[values.size() / 2];
}

// Greedy steps of the first `batch` sequences, which are brought back to where they began.
std::vector<double> time_steps(Backend& backend, const Arguments& arguments,
                               std::span<const SequenceId> ids) {
  std::vector<double> seconds;
  std::vector<TokenId> inputs(ids.size(), 1);
  std::vector<SampledToken> sampled(ids.size());
  for (int step = 0; step < arguments.steps; ++step) {
    const double start = seconds_now(arguments.threads == 1);
    backend.decode(ids, inputs, 1, sampled, {});
    seconds.push_back(seconds_now(arguments.threads == 1) - start);
    for (std::size_t b = 0; b < inputs.size(); ++b) inputs[b] = sampled[b].token;
  }
  for (const SequenceId id : ids) backend.truncate(id, arguments.context);
  return seconds;
}

nlohmann::json measure(const Arguments& arguments) {
  const std::shared_ptr<const Model> model =
      arguments.model.empty() ? test::make_random_model(test::pythia_410m_config())
                              : Model::open(arguments.model);
  BackendOptions options;
  options.threads = arguments.threads;
  options.kv_dtype = DType::float16;  // 64 sequences fit into a small machine
  const auto backend = make_cpu_backend(model, options);
  std::vector<SequenceId> ids;
  for (int b = 0; b < std::ranges::max(arguments.batches); ++b) {
    ids.push_back(backend->create_sequence({}));
    const std::vector<TokenId> context(static_cast<std::size_t>(arguments.context), 2 + b);
    backend->prefill(ids.back(), context, {});
  }
  std::map<int, std::vector<double>> seconds;
  for (int round = 0; round < arguments.rounds; ++round) {
    for (const int batch : arguments.batches) {
      const auto steps =
          time_steps(*backend, arguments, std::span(ids).first(static_cast<std::size_t>(batch)));
      seconds[batch].insert(seconds[batch].end(), steps.begin(), steps.end());
    }
  }
  nlohmann::json results = nlohmann::json::array();
  for (const auto& [batch, steps] : seconds) {
    const double fastest = *std::ranges::min_element(steps);
    results.push_back({{"sequences", batch},
                       {"step_seconds_median", median(steps)},
                       {"step_seconds_smallest", fastest},
                       {"tokens_per_second_median", batch / median(steps)},
                       {"tokens_per_second_largest", batch / fastest}});
  }
  return {{"device", backend->info().device},
          {"model", arguments.model.empty() ? "random pythia-410m" : arguments.model},
          {"dtype", name_of(model->config().dtype)},
          {"kv_dtype", name_of(backend->info().kv_dtype)},
          {"context", arguments.context},
          {"steps", arguments.rounds * arguments.steps},
          {"results", results}};
}

}  // namespace
}  // namespace clusterfusion

int main(int argc, char** argv) {
  clusterfusion::Arguments arguments;
  CLI::App app("Measures how decode steps of the CPU backend gain by more sequences.");
  app.add_option("--model", arguments.model,
                 "checkpoint folder; without it a random fp16 model of pythia-410m's shape");
  app.add_option("--threads", arguments.threads, "0: one for each usable core");
  app.add_option("--rounds", arguments.rounds)->check(CLI::PositiveNumber);
  app.add_option("--steps", arguments.steps, "decode steps a round")->check(CLI::PositiveNumber);
  app.add_option("--context", arguments.context, "positions before the first decode step")
      ->check(CLI::PositiveNumber);
  app.add_option("--batches", arguments.batches, "numbers of sequences")->delimiter(',');
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << clusterfusion::measure(arguments).dump(2) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "batch_throughput: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
