#include "speculation/theory.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <span>
#include <utility>

#include "base/fail.hpp"
#include "engine/make_engine.hpp"
#include "speculation/drafts.hpp"

namespace clusterfusion::benchmark {
namespace {

using Json = nlohmann::json;
using MakeBackend = std::function<std::unique_ptr<Backend>()>;

const std::vector<TokenId>& prompt() {
  static const std::vector<TokenId> tokens(16, 2);
  return tokens;
}

GenerateRequest greedy_request(std::int64_t tokens) {
  GenerateRequest request;
  request.prompt_tokens = prompt();
  request.max_new_tokens = tokens + 1;  // the first comes with the prompt
  request.ignore_eos = true;
  return request;
}

// Steps of so many rows, all of them right, over the positions of the text.
class StepTimer {
 public:
  StepTimer(std::unique_ptr<Backend> backend, std::vector<TokenId> text,
            std::function<double()> now)
      : backend_(std::move(backend)), text_(std::move(text)), now_(std::move(now)) {}

  // On average.
  double seconds(int rows) {
    double seconds = 0;
    int steps = 0;
    const SequenceId id = backend_->create_sequence({});
    backend_->prefill(id, prompt(), {});
    const auto count = static_cast<std::size_t>(rows);
    // The token behind the last is needed to say that the last is right.
    for (std::size_t at = prompt().size(); at + count < text_.size(); at += count) {
      const auto tokens = std::span(text_).subspan(at, count);
      Proposal proposal{id, {tokens.begin(), tokens.end()}};
      const double start = now_();
      backend_->verify({&proposal, 1});
      seconds += now_() - start;
      ++steps;
      require(proposal.chosen.size() == count && proposal.chosen.back().token == text_[at + count],
              ErrorKind::internal, "a step of {} rows chose other tokens than the text at {}", rows,
              at);
    }
    backend_->release_sequence(id);
    return seconds / steps;
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::vector<TokenId> text_;
  std::function<double()> now_;
};

struct TextTime {
  double token_seconds, token_seconds_engine, tokens_a_step;
};

TextTime time_text(Engine& engine, const TheorySettings& settings,
                   const std::vector<TokenId>& expected) {
  double first = 0, last = 0;
  bool is_first = true;
  const GenerateResult result =
      engine.generate(greedy_request(settings.tokens), [&](const GenerateEvent&) {
        last = settings.now();
        if (std::exchange(is_first, false)) first = last;
        return true;
      });
  require(result.tokens == expected, ErrorKind::internal, "the draft changed the text");
  const auto tokens = static_cast<double>(settings.tokens);
  return {(last - first) / tokens, result.statistics.seconds_per_token,
          tokens / static_cast<double>(result.statistics.decode_steps)};
}

// An engine without a draft, one whose draft knows the text, and a device whose steps are timed.
struct Bench {
  Bench(const std::shared_ptr<const Model>& model, const MakeBackend& make,
        const TheorySettings& settings)
      : plain(make_engine(model, nullptr, make(), "a benchmark", {},
                          {.prefix_cache = false, .now = settings.now})),
        expected(plain->generate(greedy_request(settings.tokens)).tokens) {
    std::vector<TokenId> text = prompt();
    text.insert(text.end(), expected.begin(), expected.end());
    auto shares_draft =
        std::make_unique<SharesDraft>(settings.shares, model->config().vocab_size, text);
    shares = shares_draft.get();
    auto limited_draft = std::make_unique<LimitedDraft>(std::move(shares_draft));
    limited = limited_draft.get();
    drafted = make_engine(model, nullptr, make(), "a benchmark", {},
                          {.prefix_cache = false,
                           .now = settings.now,
                           .draft = std::move(limited_draft),
                           .draft_tokens = std::ranges::max(settings.proposals),
                           .draft_adapts = false});
    timer = std::make_unique<StepTimer>(make(), text, settings.now);
  }

  std::unique_ptr<Engine> plain, drafted;
  std::vector<TokenId> expected;
  SharesDraft* shares = nullptr;
  LimitedDraft* limited = nullptr;
  std::unique_ptr<StepTimer> timer;
};

struct Samples {
  std::vector<double> plain;                                      // seconds a token
  std::map<int, std::vector<double>> step;                        // seconds, by rows
  std::map<std::pair<double, int>, std::vector<TextTime>> texts;  // by share and k
};

Samples take_samples(Bench& bench, const TheorySettings& settings) {
  const double begin = settings.now();
  while (settings.now() - begin < settings.warm_up_seconds)
    time_text(*bench.plain, settings, bench.expected);
  Samples samples;
  for (int round = 0; round < settings.rounds; ++round) {
    samples.plain.push_back(time_text(*bench.plain, settings, bench.expected).token_seconds);
    samples.step[1].push_back(bench.timer->seconds(1));
    for (const int k : settings.proposals) {
      samples.step[k + 1].push_back(bench.timer->seconds(k + 1));
      bench.limited->limit(k);
      for (const double share : settings.shares) {
        bench.shares->use(share);
        samples.texts[{share, k}].push_back(time_text(*bench.drafted, settings, bench.expected));
      }
    }
  }
  return samples;
}

double median_of(const std::vector<TextTime>& times, double TextTime::*member) {
  std::vector<double> values;
  for (const TextTime& time : times) values.push_back(time.*member);
  return median(std::move(values));
}

Json row_of(double share, int k, const Samples& samples) {
  const std::vector<TextTime>& times = samples.texts.at({share, k});
  const double step = median(samples.step.at(k + 1));
  const double tokens_a_step = median_of(times, &TextTime::tokens_a_step);
  const double seconds = median_of(times, &TextTime::token_seconds);
  const double engine_seconds = median_of(times, &TextTime::token_seconds_engine);
  const double theory = step / tokens_a_step;
  return {{"share_right", share},
          {"proposals", k},
          {"step_seconds_1_row", median(samples.step.at(1))},
          {"step_seconds_all_rows", step},
          {"tokens_a_step", tokens_a_step},
          {"tokens_a_step_expected", (1 - std::pow(share, k + 1)) / (1 - share)},
          {"token_seconds", seconds},
          {"token_seconds_engine", engine_seconds},
          {"token_seconds_theory", theory},
          {"over_theory", seconds / theory - 1},
          {"over_theory_engine", engine_seconds / theory - 1},
          {"token_seconds_plain", median(samples.plain)},
          {"speedup", median(samples.plain) / seconds}};
}

}  // namespace

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + std::ssize(values) / 2);
  return values[values.size() / 2];
}

Json measure_theory(const std::shared_ptr<const Model>& model, const MakeBackend& make,
                    const TheorySettings& settings) {
  Bench bench(model, make, settings);
  const Samples samples = take_samples(bench, settings);
  Json rows = Json::array();
  for (const int k : settings.proposals)
    for (const double share : settings.shares) rows.push_back(row_of(share, k, samples));
  return {{"tokens", settings.tokens}, {"rounds", settings.rounds}, {"rows", rows}};
}

}  // namespace clusterfusion::benchmark
