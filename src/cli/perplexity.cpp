// clusterfusion perplexity: how well a model predicts a text, by sliding window.
#include <fmt/format.h>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/interrupt.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/text_source.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

struct Settings {
  EngineSettings engine;
  ReportSettings report;
  TextSource source;
  PerplexityOptions window;
  bool no_special_tokens = false;
};

std::string result_text(const PerplexityResult& result) {
  return fmt::format("perplexity {:.4f}\n{:.5f} nats/token, {:.5f} bits/byte, {} of {} in {}\n",
                     result.perplexity, result.mean_nll, result.bits_per_byte,
                     format_count(result.scored_tokens, "scored token"), result.total_tokens,
                     format_duration(result.seconds));
}

Json result_json(const PerplexityResult& result) {
  return {{"perplexity", result.perplexity},       {"mean_nll", result.mean_nll},
          {"bits_per_byte", result.bits_per_byte}, {"scored_tokens", result.scored_tokens},
          {"total_tokens", result.total_tokens},   {"seconds", result.seconds}};
}

PerplexityResult measure(Engine& engine, const Settings& settings) {
  const std::string text = read_text(settings.source);
  const std::vector<TokenId> tokens = encode(engine.tokenizer(), text, !settings.no_special_tokens,
                                             name_of(settings.source), settings.report.quiet);
  const InterruptScope interrupt;
  ProgressBar progress("perplexity", "tokens", settings.report.quiet);
  PerplexityOptions window = settings.window;
  std::int64_t tokens_done = 0;
  window.progress = [&](std::int64_t done, std::int64_t total) {
    tokens_done = done;
    progress.update(done, total);
    return !interrupt.interrupted();
  };
  const auto bytes = static_cast<std::int64_t>(text.size());
  const PerplexityResult result = engine.perplexity(tokens, bytes, window);
  // Part of a text has another perplexity than the whole: better no result than a wrong one.
  require(!interrupt.interrupted(), ErrorKind::io,
          "interrupted after {} of {} tokens; no result (the perplexity so far is {:.4f})",
          tokens_done, tokens.size(), result.perplexity);
  return result;
}

ExitCode run(const Settings& settings) {
  const std::unique_ptr<Engine> engine = open_engine(settings.engine, settings.report);
  const PerplexityResult result = measure(*engine, settings);
  write_output(settings.report.json ? to_line(result_json(result)) : result_text(result));
  return kDone;
}

}  // namespace

void add_perplexity_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<Settings>();
  CLI::App& command = *add_command(
      app, selected, "perplexity", "Measure how well the model predicts a text.", settings, &run,
      "The sliding-window measure of https://huggingface.co/docs/transformers/perplexity: windows\n"
      "of --context tokens move on by --stride, and each token is scored once, in the first "
      "window\n"
      "that holds it, given the tokens before it in that window.\n\n"
      "Keys of --json: perplexity, mean_nll (nats), bits_per_byte, scored_tokens, total_tokens,\n"
      "seconds.",
      "clusterfusion perplexity models/demo -f novel.txt --context 256 --stride 128");
  add_engine_options(command, settings->engine);
  add_text_options(command, settings->source, "--text", "--file");
  add_number(command, "--context", settings->window.context,
             "tokens in a window, at least 2; 0: the model's longest context", std::int64_t{0})
      ->capture_default_str();
  add_number(command, "--stride", settings->window.stride,
             "tokens by which the window moves on, at least 2; 0: half the window", std::int64_t{0})
      ->capture_default_str();
  add_report_options(command, settings->report);
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens");
}

}  // namespace clusterfusion::cli
