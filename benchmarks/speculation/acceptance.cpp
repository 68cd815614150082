#include "speculation/acceptance.hpp"

#include <algorithm>
#include <fstream>
#include <map>
#include <utility>

#include "base/fail.hpp"
#include "engine/choose_device.hpp"
#include "engine/make_engine.hpp"
#include "engine/open_draft.hpp"
#include "speculation/drafts.hpp"

namespace clusterfusion::benchmark {
namespace {

using Json = nlohmann::json;

struct LimitedEngine {
  std::unique_ptr<Engine> engine;
  LimitedDraft* draft = nullptr;
};

LimitedEngine open_engine(const AcceptanceSettings& settings, const std::string& draft) {
  EngineOptions options = settings.options;
  options.draft = draft;
  const std::shared_ptr<const Model> model = Model::open(settings.model);
  const std::shared_ptr<const Tokenizer> tokenizer = Tokenizer::open(settings.model);
  auto limited =
      std::make_unique<LimitedDraft>(open_draft(options, settings.device, *model, tokenizer.get()));
  LimitedEngine opened{nullptr, limited.get()};
  BackendOptions backend_options;
  backend_options.threads = options.threads;
  backend_options.mode = options.mode;
  DeviceChoice choice{settings.device, {}};
  opened.engine =
      make_engine(model, tokenizer, make_backend(settings.device, choice, model, backend_options),
                  "a benchmark", {},
                  {.draft = std::move(limited),
                   .draft_tokens = std::ranges::max(settings.proposals),
                   .draft_adapts = false});
  return opened;
}

std::vector<GenerateRequest> requests_of(const AcceptanceSettings& settings, float temperature) {
  std::vector<GenerateRequest> requests;
  for (const Prompt& prompt : settings.prompts) {
    GenerateRequest request;
    request.prompt = prompt.text;
    request.max_new_tokens = settings.tokens + 1;
    request.ignore_eos = true;
    request.sampling.temperature = temperature;
    request.sampling.seed = requests.size();
    requests.push_back(std::move(request));
  }
  return requests;
}

struct Counts {
  std::int64_t texts = 0, tokens = 0, steps = 0, proposed = 0, accepted = 0;
};

std::map<std::string, Counts> count(const AcceptanceSettings& settings,
                                    const std::vector<GenerateResult>& results) {
  std::map<std::string, Counts> counts;
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Statistics& statistics = results[i].statistics;
    Counts& of_kind = counts[settings.prompts[i].kind];
    ++of_kind.texts;
    of_kind.tokens += statistics.new_tokens - 1;  // the first comes with the prompt
    of_kind.steps += statistics.decode_steps;
    of_kind.proposed += statistics.draft_proposed;
    of_kind.accepted += statistics.draft_accepted;
  }
  return counts;
}

}  // namespace

std::vector<Prompt> read_prompts(const std::string& file) {
  std::ifstream stream(file);
  require(stream.good(), ErrorKind::not_found, "{}: no such file of prompts", file);
  std::vector<Prompt> prompts;
  for (const Json& entry : Json::parse(stream))
    prompts.push_back({entry.at("kind"), entry.at("prompt")});
  return prompts;
}

Json measure_acceptance(const AcceptanceSettings& settings) {
  Json rows = Json::array();
  std::map<float, std::vector<GenerateResult>> expected;
  for (const std::string& name : settings.drafts) {
    const LimitedEngine opened = open_engine(settings, name);
    for (const float temperature : settings.temperatures) {
      for (const int k : settings.proposals) {
        opened.draft->limit(k);
        auto results = opened.engine->generate(requests_of(settings, temperature));
        for (const auto& [kind, counts] : count(settings, results)) {
          rows.push_back({{"kind", kind},
                          {"temperature", std::round(10 * temperature) / 10.0},
                          {"draft", name},
                          {"proposals", k},
                          {"texts", counts.texts},
                          {"tokens", counts.tokens},
                          {"steps", counts.steps},
                          {"proposed", counts.proposed},
                          {"accepted", counts.accepted}});
        }
        auto& texts = expected[temperature];
        if (texts.empty())
          texts = std::move(results);
        else
          for (std::size_t i = 0; i < texts.size(); ++i)
            require(results[i].tokens == texts[i].tokens, ErrorKind::internal,
                    "draft {} with {} proposals changed text {}", name, k, i);
      }
    }
  }
  return {{"model", settings.model}, {"tokens", settings.tokens}, {"rows", rows}};
}

}  // namespace clusterfusion::benchmark
