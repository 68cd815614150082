// clusterfusion score: the log-probability of a text, token by token, or of pairs of texts.
#include <fmt/format.h>

#include <cmath>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/interrupt.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/score_pairs.hpp"
#include "cli/standard_output.hpp"
#include "cli/text_source.hpp"
#include "cli/token_text.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

struct ScoreSettings {
  EngineSettings engine;
  ReportSettings report;
  TextSource source;
  bool no_special_tokens = false;
  bool pairs = false;
  std::int32_t num_top = 0;
};

Json result_json(const ScoreResult& score, const Tokenizer& tokenizer) {
  Json json = {{"total_logprob", score.total}, {"tokens", Json::array()}};
  for (std::size_t i = 0; i < score.tokens.size(); ++i) {
    json["tokens"].push_back({{"token", score.tokens[i]},
                              {"piece", tokenizer.id_to_token(score.tokens[i])},
                              {"logprob", i == 0 ? Json() : Json(score.logprobs[i - 1])}});
  }
  return json;
}

void print_table(const ScoreResult& score, const Tokenizer& tokenizer) {
  write_output(fmt::format("{:>6} {:>8} {:>12}  {}\n", "index", "id", "logprob", "token"));
  for (std::size_t i = 0; i < score.tokens.size(); ++i) {
    const std::string logprob = i == 0 ? "-" : fmt::format("{:.5f}", score.logprobs[i - 1]);
    write_output(fmt::format("{:>6} {:>8} {:>12}  {}\n", i, score.tokens[i], logprob,
                             quote(tokenizer.bytes_of(score.tokens[i]))));
  }
  const auto scored = static_cast<std::int64_t>(score.logprobs.size());
  write_output(fmt::format("total log-probability {:.5f} nats over {}\n", score.total,
                           format_count(scored, "scored token")));
}

ExitCode run(const ScoreSettings& settings) {
  require(settings.num_top == 0 || (settings.pairs && settings.report.json),
          ErrorKind::invalid_argument, "--top needs a place to show them: add --pairs and --json");
  require(!settings.pairs || !settings.no_special_tokens, ErrorKind::invalid_argument,
          "--no-special-tokens is for one text; a pair is encoded as its two texts in one");
  const std::string text = read_text(settings.source);
  EngineSettings engine_settings = settings.engine;
  if (settings.pairs) engine_settings.options.interrupted = signal_noted;
  const std::unique_ptr<Engine> engine = open_engine(engine_settings, settings.report);
  if (settings.pairs) {
    score_pairs(*engine, text, name_of(settings.source), settings.num_top, settings.report);
    return kDone;
  }
  const Tokenizer& tokenizer = engine->tokenizer();
  const std::vector<TokenId> tokens = encode(tokenizer, text, !settings.no_special_tokens,
                                             name_of(settings.source), settings.report.quiet);
  const ScoreResult score = engine->score(tokens);
  if (settings.report.json) {
    write_output(to_line(result_json(score, tokenizer)));
  } else {
    print_table(score, tokenizer);
  }
  return kDone;
}

}  // namespace

void add_score_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<ScoreSettings>();
  CLI::App& command = *add_command(
      app, selected, "score", "Print the log-probability of each token of a text.", settings, &run,
      "Log-probabilities are natural logarithms; the first token has none.\n"
      "With --pairs the text is one pair {\"context\": \"...\", \"continuation\": \"...\"} a line, "
      "and\n"
      "each continuation is scored after its context, divided as lm-evaluation-harness does.\n\n"
      "Keys of --json: total_logprob, tokens (token, piece, logprob); with --pairs one line for "
      "each\n"
      "pair: total_logprob, is_greedy, tokens (token, piece, logprob, top).",
      "clusterfusion score models/demo -p \"It was a dark night\"");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  add_text_options(command, settings->source, "--text", "--file");
  command.add_flag("--pairs", settings->pairs,
                   "score continuations after contexts, one pair a line");
  add_number(command, "--top", settings->num_top,
             "the N likeliest tokens at each place (with --pairs --json)", std::int32_t{0},
             std::int32_t{100})
      ->capture_default_str();
  add_report_options(command, settings->report);
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens");
}

}  // namespace clusterfusion::cli
