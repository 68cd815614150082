// clusterfusion perplexity: how well a model predicts a text, by sliding window.
#include <fmt/format.h>

#include <map>
#include <string>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/interrupt.hpp"
#include "cli/number.hpp"
#include "cli/option_table.hpp"
#include "cli/options.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/text_source.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

struct PerplexitySettings {
  EngineSettings engine;
  ReportSettings report;
  TextSource source;
  PerplexityOptions window;
  bool no_special_tokens = false;
};

std::string result_text(const PerplexityResult& result) {
  const std::string bits =
      result.bits_per_byte > 0 ? fmt::format(" {:.5f} bits/byte,", result.bits_per_byte) : "";
  return fmt::format("perplexity {:.4f}\n{:.5f} nats/token,{} {} of {} in {}\n", result.perplexity,
                     result.mean_nll, bits, format_count(result.scored_tokens, "scored token"),
                     result.total_tokens, format_duration(result.seconds));
}

Json result_json(const PerplexityResult& result) {
  return {{"perplexity", result.perplexity},       {"mean_nll", result.mean_nll},
          {"bits_per_byte", result.bits_per_byte}, {"scored_tokens", result.scored_tokens},
          {"total_tokens", result.total_tokens},   {"seconds", result.seconds}};
}

PerplexityResult measure(Engine& engine, const PerplexitySettings& settings) {
  const std::string text = read_text(settings.source);
  warn_if_not_utf8(text, name_of(settings.source), settings.report.quiet);
  const InterruptScope interrupt;
  ProgressBar progress("perplexity", "tokens", settings.report.quiet);
  PerplexityOptions window = settings.window;
  std::string tokens_done = "before the first window of tokens was done";
  window.progress = [&](std::int64_t done, std::int64_t total) {
    tokens_done = fmt::format("after {} of {} tokens", done, total);
    progress.update(done, total);
    return true;
  };
  try {
    return engine.perplexity(text, !settings.no_special_tokens, window);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::interrupted) throw;
    // Part of a text has another perplexity than the whole: better no result than a wrong one.
    fail(error.kind(), "interrupted {}; no result", tokens_done);
  }
}

// Names as the option takes them.
const std::map<std::string, PerplexityMethod> kMethods{
    {"each-token", PerplexityMethod::each_token},
    {"transformers-docs", PerplexityMethod::transformers_docs}};

ExitCode run(const PerplexitySettings& settings) {
  EngineSettings engine_settings = settings.engine;
  engine_settings.options.interrupted = signal_noted;
  const std::unique_ptr<Engine> engine = open_engine(engine_settings, settings.report);
  const PerplexityResult result = measure(*engine, settings);
  write_output(settings.report.json ? to_line(result_json(result)) : result_text(result));
  return kDone;
}

}  // namespace

void add_perplexity_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<PerplexitySettings>();
  CLI::App& command = *add_command(
      app, selected, "perplexity", "Measure how well the model predicts a text.", settings, &run,
      "Windows of --context tokens move on by --stride. Each token but the first of the text is\n"
      "scored once, in the first window that holds it, given the tokens before it in that window,\n"
      "and counts once; bits per byte are over the bytes of these tokens. --method\n"
      "transformers-docs is the loop of https://huggingface.co/docs/transformers/perplexity, "
      "which\n"
      "weighs a window by its new tokens less one; it has no bits per byte. Ctrl-C ends it "
      "without\n"
      "a result.\n\n"
      "Keys of --json: perplexity, mean_nll (nats), bits_per_byte, scored_tokens, total_tokens,\n"
      "seconds.",
      "clusterfusion perplexity models/demo -f novel.txt --context 256 --stride 128");
  add_engine_options(command, settings->engine);
  add_text_options(command, settings->source, "--text", "--file");
  add_number(command, "--context", settings->window.context,
             "tokens in a window, at least 2; 0: the model's longest context", std::int64_t{0})
      ->capture_default_str();
  add_number(command, "--stride", settings->window.stride,
             "tokens by which the window moves on; 0: half the window", std::int64_t{0})
      ->capture_default_str();
  command
      .add_option_function<std::string>(
          "--method",
          [settings](const std::string& name) { settings->window.method = kMethods.at(name); },
          "how tokens are scored and counted: each-token or transformers-docs")
      ->transform(one_of({"each-token", "transformers-docs"}))
      ->type_name("NAME")
      ->default_str("each-token");
  add_report_options(command, settings->report);
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens");
}

}  // namespace clusterfusion::cli
