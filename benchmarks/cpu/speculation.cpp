// What drafts gain on the CPU. Figures go to stdout as JSON. With one thread (the default) times
// are of the processor, in which other programs count less.
//
// theory  The time of a token with a draft that knows the text (speculation/theory.hpp).
// texts   Prompts of a file, without a draft and with drafts, in turns.
// acceptance  With --acceptance: how many tokens a step gives on these prompts with always as many
//             proposals (speculation/acceptance.hpp).
// ngram   The host's time of one step of the n-gram draft at the end of long texts.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <ctime>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/make_engine.hpp"
#include "engine/ngram_draft.hpp"
#include "engine/open_draft.hpp"
#include "speculation/acceptance.hpp"
#include "speculation/theory.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

using Json = nlohmann::json;
using benchmark::median;

struct Arguments {
  std::string model;
  std::string prompts;
  int threads = 1;
  int rounds = 5;
  std::int64_t tokens = 96;
  std::vector<double> shares = {0.5, 0.7, 0.9};
  std::vector<int> proposals = {1, 3, 7};
  std::vector<std::string> drafts = {"ngram"};
  bool acceptance = false;
};

std::function<double()> clock_of(const Arguments& arguments) {
  const clockid_t clock = arguments.threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC;
  return [clock] {
    timespec now{};
    clock_gettime(clock, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  };
}

ModelConfig pythia_160m_config() {
  ModelConfig config = test::pythia_410m_config();
  config.hidden_size = 768;
  config.num_layers = 12;
  config.num_heads = 12;
  config.intermediate_size = 3072;
  return config;
}

std::shared_ptr<const Model> model_of(const Arguments& arguments) {
  return arguments.model.empty() ? test::make_random_model(pythia_160m_config())
                                 : Model::open(arguments.model);
}

std::unique_ptr<Backend> backend_of(const Arguments& arguments,
                                    const std::shared_ptr<const Model>& model) {
  BackendOptions options;
  options.threads = arguments.threads;
  return make_cpu_backend(model, options);
}

Json measure_theory_of(const Arguments& arguments) {
  const std::shared_ptr<const Model> model = model_of(arguments);
  Json theory = benchmark::measure_theory(model, [&] { return backend_of(arguments, model); },
                                          {.tokens = arguments.tokens,
                                           .rounds = arguments.rounds,
                                           .shares = arguments.shares,
                                           .proposals = arguments.proposals,
                                           .now = clock_of(arguments)});
  theory["model"] = arguments.model.empty() ? "random pythia-160m" : arguments.model;
  return theory;
}

std::unique_ptr<Engine> drafted_engine(const Arguments& arguments, const std::string& draft) {
  const std::shared_ptr<const Model> model = Model::open(arguments.model);
  const std::shared_ptr<const Tokenizer> tokenizer = Tokenizer::open(arguments.model);
  EngineOptions options;
  options.threads = arguments.threads;
  options.draft = draft;
  return make_engine(model, tokenizer, backend_of(arguments, model), "a benchmark", {},
                     {.prefix_cache = false,
                      .now = clock_of(arguments),
                      .draft = open_draft(options, "cpu", *model, tokenizer.get())});
}

Json measure_texts(const Arguments& arguments) {
  std::vector<std::unique_ptr<Engine>> engines;
  std::vector<std::string> names{"none"};
  names.insert(names.end(), arguments.drafts.begin(), arguments.drafts.end());
  for (const std::string& draft : names) engines.push_back(drafted_engine(arguments, draft));
  Json rows = Json::array();
  for (const auto& [kind, text] : benchmark::read_prompts(arguments.prompts)) {
    for (const float temperature : {0.0f, 0.8f}) {
      GenerateRequest request;
      request.prompt = text;
      request.max_new_tokens = arguments.tokens + 1;
      request.ignore_eos = true;
      request.sampling.temperature = temperature;
      std::vector<std::vector<double>> seconds(engines.size());
      std::vector<GenerateResult> results(engines.size());
      for (int round = 0; round < arguments.rounds; ++round) {
        for (std::size_t i = 0; i < engines.size(); ++i) {
          results[i] = engines[i]->generate(request);
          if (results[i].tokens != results[0].tokens)
            throw std::runtime_error("a draft changed a text");
          seconds[i].push_back(results[i].statistics.seconds_per_token);
        }
      }
      for (std::size_t i = 0; i < engines.size(); ++i) {
        const Statistics& statistics = results[i].statistics;
        rows.push_back({{"kind", kind},
                        {"temperature", temperature},
                        {"draft", names[i]},
                        {"token_seconds", median(seconds[i])},
                        {"speedup", median(seconds[0]) / median(seconds[i])},
                        {"decode_steps", statistics.decode_steps},
                        {"draft_steps", statistics.draft_steps},
                        {"proposed", statistics.draft_proposed},
                        {"accepted", statistics.draft_accepted}});
      }
    }
  }
  return {{"model", arguments.model},
          {"tokens", arguments.tokens},
          {"rounds", arguments.rounds},
          {"rows", rows}};
}

Json measure_ngram(const Arguments& arguments) {
  constexpr int kSteps = 2000;
  const std::function<double()> now = clock_of(arguments);
  Json rows = Json::array();
  for (const int length : {1000, 10000, 100000}) {
    for (const unsigned variety : {50u, 50000u}) {
      std::mt19937 random(1);
      NgramDraft draft;
      const auto text = draft.begin({});
      std::vector<TokenId> tokens;
      while (std::ssize(tokens) < length)
        tokens.push_back(static_cast<TokenId>(random() % variety));
      text->append(tokens);
      while (!text->read()) {
      }
      std::vector<double> seconds;
      for (int step = 0; step < arguments.rounds * kSteps; ++step) {
        const auto token = static_cast<TokenId>(random() % variety);
        const double start = now();
        text->append({&token, 1});
        text->read();
        DraftQuery query{text.get(), 8};
        draft.propose({&query, 1});
        seconds.push_back(now() - start);
      }
      std::ranges::sort(seconds);
      rows.push_back({{"tokens", length},
                      {"different_tokens", variety},
                      {"step_microseconds_median", 1e6 * seconds[seconds.size() / 2]},
                      {"step_microseconds_99", 1e6 * seconds[seconds.size() * 99 / 100]}});
    }
  }
  return rows;
}

Json measure_acceptance_of(const Arguments& arguments) {
  benchmark::AcceptanceSettings settings{.model = arguments.model,
                                         .drafts = arguments.drafts,
                                         .prompts = benchmark::read_prompts(arguments.prompts),
                                         .tokens = arguments.tokens};
  settings.options.threads = arguments.threads;
  return benchmark::measure_acceptance(settings);
}

Json measure(const Arguments& arguments) {
  const auto model = test::make_random_model(test::small_config());
  Json figures = {{"device", backend_of(arguments, model)->info().device},
                  {"ngram", measure_ngram(arguments)},
                  {"theory", measure_theory_of(arguments)}};
  if (!arguments.prompts.empty()) figures["texts"] = measure_texts(arguments);
  if (arguments.acceptance) figures["acceptance"] = measure_acceptance_of(arguments);
  return figures;
}

}  // namespace
}  // namespace clusterfusion

int main(int argc, char** argv) {
  clusterfusion::Arguments arguments;
  CLI::App app("Measures what drafts gain on the CPU.");
  app.add_option("--model", arguments.model,
                 "checkpoint folder; without it a random fp16 model of pythia-160m's shape");
  app.add_option("--prompts", arguments.prompts,
                 "JSON list of {\"kind\", \"prompt\"}, for a model with a tokenizer");
  app.add_option("--drafts", arguments.drafts, "for the prompts")->delimiter(',');
  app.add_flag("--acceptance", arguments.acceptance, "of the prompts, with always as many");
  app.add_option("--threads", arguments.threads, "0: one for each usable core")
      ->capture_default_str();
  app.add_option("--rounds", arguments.rounds)->check(CLI::PositiveNumber);
  app.add_option("--tokens", arguments.tokens, "of each text")->check(CLI::PositiveNumber);
  app.add_option("--shares", arguments.shares, "of the tokens that are right")->delimiter(',');
  app.add_option("--proposals", arguments.proposals, "in each step")->delimiter(',');
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << clusterfusion::measure(arguments).dump(2) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "speculation: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
