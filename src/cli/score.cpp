// clusterfusion score: the log-probability of a text, token by token.
#include <fmt/format.h>

#include <cmath>

#include "cli/commands.hpp"
#include "cli/options.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/text_source.hpp"
#include "cli/token_text.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

struct Settings {
  EngineSettings engine;
  ReportSettings report;
  TextSource source;
  bool no_special_tokens = false;
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

ExitCode run(const Settings& settings) {
  const std::string text = read_text(settings.source);
  const std::unique_ptr<Engine> engine = open_engine(settings.engine, settings.report);
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
  const auto settings = std::make_shared<Settings>();
  CLI::App& command = *add_command(
      app, selected, "score", "Print the log-probability of each token of a text.", settings, &run,
      "Log-probabilities are natural logarithms; the first token has none.\n\n"
      "Keys of --json: total_logprob, tokens (token, piece, logprob).",
      "clusterfusion score models/demo -p \"It was a dark night\"");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  add_text_options(command, settings->source, "--text", "--file");
  add_report_options(command, settings->report);
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens");
}

}  // namespace clusterfusion::cli
