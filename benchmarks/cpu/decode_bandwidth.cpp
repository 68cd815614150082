// How close decoding on the CPU comes to a plain read of the weights, and how long a prefill takes.
// Rounds of plain read, prefill and decode take turns, so that what else the machine does meets all
// of them; medians and quartiles go to stdout as JSON.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "backend/backend.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

struct Arguments {
  std::string model;
  int threads = 0;
  int rounds = 5;
  int steps = 16;
  int prompt = 512;
  int context = 16;
  int batch = 1;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Median and quartiles.
nlohmann::json summary(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<std::size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {{"median", at(0.5)},
          {"quartile_1", at(0.25)},
          {"quartile_3", at(0.75)},
          {"best", values[0]},
          {"count", values.size()}};
}

std::vector<TokenId> prompt_of(std::int64_t count, std::int64_t vocab) {
  std::vector<TokenId> tokens(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = static_cast<TokenId>(i * 7919 % static_cast<std::size_t>(vocab));
  }
  return tokens;
}

double time_prefill(Backend& backend, std::span<const TokenId> prompt, std::span<float> logits) {
  const SequenceId id = backend.create_sequence({});
  backend.reserve(id, static_cast<std::int64_t>(prompt.size()));
  const auto start = std::chrono::steady_clock::now();
  PrefillOutput output;
  output.last_logits = logits;
  backend.prefill(id, prompt, output);
  const double seconds = seconds_since(start);
  backend.release_sequence(id);
  return seconds;
}

// Appends the seconds of each greedy step of a batch that starts behind `context` positions.
void time_decode(Backend& backend, const Arguments& arguments, std::span<const TokenId> context,
                 std::vector<double>& seconds) {
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs(static_cast<std::size_t>(arguments.batch), 1);
  std::vector<SampledToken> sampled(inputs.size());
  for (int b = 0; b < arguments.batch; ++b) {
    ids.push_back(backend.create_sequence({}));
    backend.prefill(ids.back(), context, {});
  }
  for (int step = 0; step < arguments.steps; ++step) {
    const auto start = std::chrono::steady_clock::now();
    backend.decode(ids, inputs, 1, sampled, {});
    seconds.push_back(seconds_since(start));
    for (std::size_t b = 0; b < inputs.size(); ++b) inputs[b] = sampled[b].token;
  }
  for (const SequenceId id : ids) backend.release_sequence(id);
}

nlohmann::json measure(const Arguments& arguments) {
  const std::shared_ptr<const Model> model =
      arguments.model.empty() ? test::make_random_model(test::pythia_410m_config())
                              : Model::open(arguments.model);
  BackendOptions options;
  options.threads = arguments.threads;
  const auto backend = make_cpu_backend(model, options);
  const std::int64_t vocab = model->config().vocab_size;
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  const auto prompt = prompt_of(arguments.prompt, vocab);
  const auto context = prompt_of(arguments.context, vocab);

  std::vector<double> read, prefill, decode, share;
  backend->measure_read_ceiling();  // brings the weights into memory
  time_prefill(*backend, prompt, logits);
  for (int round = 0; round < arguments.rounds; ++round) {
    const double before = backend->measure_read_ceiling();
    std::vector<double> steps;
    time_decode(*backend, arguments, context, steps);
    const double after = backend->measure_read_ceiling();
    prefill.push_back(time_prefill(*backend, prompt, logits));
    read.insert(read.end(), {before, after});
    decode.insert(decode.end(), steps.begin(), steps.end());
    std::nth_element(steps.begin(), steps.begin() + steps.size() / 2, steps.end());
    share.push_back(static_cast<double>(model->bytes_per_token()) / steps[steps.size() / 2] /
                    std::max(before, after));
  }
  return {{"device", backend->info().device},
          {"model", arguments.model.empty() ? "random pythia-410m" : arguments.model},
          {"dtype", name_of(model->config().dtype)},
          {"batch", arguments.batch},
          {"context", arguments.context},
          {"prompt_tokens", arguments.prompt},
          {"bytes_per_token", model->bytes_per_token()},
          {"read_bytes_per_second", summary(read)},
          {"decode_seconds", summary(decode)},
          {"decode_share_of_read", summary(share)},
          {"prefill_seconds", summary(prefill)}};
}

}  // namespace
}  // namespace clusterfusion

int main(int argc, char** argv) {
  clusterfusion::Arguments arguments;
  CLI::App app("Measures decode and prefill of the CPU backend against a plain read.");
  app.add_option("--model", arguments.model,
                 "checkpoint folder; without it a random fp16 model of pythia-410m's shape");
  app.add_option("--threads", arguments.threads, "0: one for each usable core");
  app.add_option("--rounds", arguments.rounds)->check(CLI::PositiveNumber);
  app.add_option("--steps", arguments.steps, "decode steps a round")->check(CLI::PositiveNumber);
  app.add_option("--prompt", arguments.prompt, "tokens of the prefill")->check(CLI::PositiveNumber);
  app.add_option("--context", arguments.context, "positions before the first decode step")
      ->check(CLI::PositiveNumber);
  app.add_option("--batch", arguments.batch, "sequences")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << clusterfusion::measure(arguments).dump(2) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "decode_bandwidth: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
