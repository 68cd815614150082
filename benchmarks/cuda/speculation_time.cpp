// What drafts gain on a GPU in mode throughput. Figures go to stdout as JSON.
//   speculation_time [--theory pythia-2.8b] [--costs pythia-6.9b --draft-shape pythia-70m]
//                    [--model FOLDER --prompts FILE --drafts ngram,FOLDER]
//
// theory      The time of a token with a draft that knows the text (speculation/theory.hpp), for
//             random float16 weights (random_model.hpp).
// costs       Of a step that verifies some rows of one sequence, of a plain step in both modes, and
//             of a draft's tokens, for random weights likewise.
// acceptance  How many tokens a step gives on texts of a file (speculation/acceptance.hpp).
#include <CLI/CLI.hpp>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.hpp"
#include "random_model.hpp"
#include "speculation/acceptance.hpp"
#include "speculation/theory.hpp"

namespace clusterfusion::benchmark {
namespace {

using Json = nlohmann::json;

struct Arguments {
  std::string theory, costs, draft_shape = "pythia-70m", prompts;
  TheorySettings settings;
  AcceptanceSettings acceptance;
  std::int64_t context = 256;
  std::vector<int> rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16};
};

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::shared_ptr<const Model> random_model(const std::string& name) {
  const Shape* const shape = find_shape(name);
  if (shape == nullptr)
    throw std::invalid_argument(name + ": expected a shape, such as pythia-2.8b");
  return std::make_shared<SharedModel>(*shape);
}

std::unique_ptr<Backend> backend_of(const std::shared_ptr<const Model>& model, DecodeMode mode) {
  BackendOptions options;
  options.mode = mode;
  return make_cuda_backend(model, options);
}

// Times of one sequence that stays at one length.
class SequenceTimer {
 public:
  SequenceTimer(std::unique_ptr<Backend> backend, std::int64_t context, int rounds)
      : backend_(std::move(backend)), context_(context), rounds_(rounds) {
    id_ = backend_->create_sequence({});
    std::vector<TokenId> prompt(static_cast<std::size_t>(context));
    for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<TokenId>(2 + i % 997);
    backend_->prefill(id_, prompt, {});
    const double begin = seconds_now();
    while (seconds_now() - begin < kWarmUpSeconds) decode(16);
  }

  // Steps that verify so many rows.
  double verify_seconds(int rows) {
    return median_seconds([&] {
      Proposal proposal{id_, std::vector<TokenId>(static_cast<std::size_t>(rows), 5)};
      backend_->verify({&proposal, 1});
    });
  }
  // So many plain steps that the host starts at once, all together.
  double decode_seconds(int steps) {
    return median_seconds([&] { decode(steps); });
  }

 private:
  static constexpr double kWarmUpSeconds = 1;
  static constexpr int kCalls = 16;  // in a round

  void decode(int steps) {
    std::vector<SampledToken> sampled(static_cast<std::size_t>(steps));
    const TokenId input = 5;
    backend_->decode({&id_, 1}, {&input, 1}, steps, sampled, {});
    backend_->truncate(id_, context_);
  }

  template <typename Call>
  double median_seconds(Call call) {
    std::vector<double> seconds;
    for (int round = 0; round < rounds_; ++round) {
      double sum = 0;
      for (int i = 0; i < kCalls; ++i) {
        const double start = seconds_now();
        call();
        sum += seconds_now() - start;
        backend_->truncate(id_, context_);
      }
      seconds.push_back(sum / kCalls);
    }
    return median(std::move(seconds));
  }

  std::unique_ptr<Backend> backend_;
  SequenceId id_ = -1;
  std::int64_t context_;
  int rounds_;
};

Json measure_costs(const Arguments& arguments) {
  const int rounds = arguments.settings.rounds;
  const auto timer_of = [&](const std::shared_ptr<const Model>& model, DecodeMode mode) {
    return SequenceTimer(backend_of(model, mode), arguments.context, rounds);
  };
  const std::shared_ptr<const Model> target = random_model(arguments.costs);
  constexpr int kBurst = 16;
  Json costs = {{"model", arguments.costs},
                {"draft_model", arguments.draft_shape},
                {"context", arguments.context},
                {"rounds", rounds}};
  {
    SequenceTimer timer = timer_of(target, DecodeMode::throughput);
    costs["plain_seconds"] = timer.decode_seconds(kBurst) / kBurst;
    for (const int rows : arguments.rows)
      costs["step_seconds"].push_back({{"rows", rows}, {"seconds", timer.verify_seconds(rows)}});
  }
  costs["plain_seconds_latency"] =
      timer_of(target, DecodeMode::latency).decode_seconds(kBurst) / kBurst;
  SequenceTimer draft = timer_of(random_model(arguments.draft_shape), DecodeMode::throughput);
  for (int tokens = 1; tokens <= kBurst; ++tokens)
    costs["draft_seconds"].push_back(
        {{"tokens", tokens}, {"seconds", draft.decode_seconds(tokens)}});
  return costs;
}

Json measure(Arguments arguments) {
  arguments.settings.now = seconds_now;
  arguments.settings.warm_up_seconds = 2;
  const auto smallest = backend_of(random_model("pythia-14m"), DecodeMode::throughput);
  Json figures = {{"device", smallest->info().device}};
  if (!arguments.theory.empty()) {
    const std::shared_ptr<const Model> model = random_model(arguments.theory);
    const auto make = [&] { return backend_of(model, DecodeMode::throughput); };
    figures["theory"] = measure_theory(model, make, arguments.settings);
    figures["theory"]["model"] = arguments.theory;
  }
  if (!arguments.costs.empty()) figures["costs"] = measure_costs(arguments);
  if (!arguments.acceptance.model.empty()) {
    arguments.acceptance.prompts = read_prompts(arguments.prompts);
    arguments.acceptance.device = "cuda";
    arguments.acceptance.options.mode = DecodeMode::throughput;
    figures["acceptance"] = measure_acceptance(arguments.acceptance);
  }
  return figures;
}

}  // namespace
}  // namespace clusterfusion::benchmark

int main(int argc, char** argv) {
  clusterfusion::benchmark::Arguments arguments;
  CLI::App app("Measures what drafts gain on a GPU.");
  app.add_option("--theory", arguments.theory, "a shape, such as pythia-2.8b");
  app.add_option("--tokens", arguments.settings.tokens, "of the text")->capture_default_str();
  app.add_option("--rounds", arguments.settings.rounds)->check(CLI::PositiveNumber);
  app.add_option("--shares", arguments.settings.shares, "of the tokens that are right")
      ->delimiter(',');
  app.add_option("--proposals", arguments.settings.proposals, "in each step")->delimiter(',');
  app.add_option("--costs", arguments.costs, "the target's shape");
  app.add_option("--draft-shape", arguments.draft_shape)->capture_default_str();
  app.add_option("--context", arguments.context, "at which costs are measured");
  app.add_option("--model", arguments.acceptance.model, "checkpoint folder, for acceptance");
  app.add_option("--drafts", arguments.acceptance.drafts)->delimiter(',');
  app.add_option("--prompts", arguments.prompts, "JSON list of {\"kind\", \"prompt\"}");
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << clusterfusion::benchmark::measure(arguments).dump(1) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "speculation_time: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
