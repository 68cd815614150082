#include "cli/options.hpp"

#include <fmt/format.h>

#include "base/fail.hpp"
#include "cli/number.hpp"
#include "cli/option_table.hpp"
#include "cli/progress.hpp"
#include "cli/terminal.hpp"
#include "cli/token_text.hpp"

namespace clusterfusion::cli {
namespace {

// What takes less is over before a reader has looked.
constexpr std::chrono::milliseconds kLoadingPatience{300};

std::optional<DType> parse_dtype(const std::string& name) {
  for (DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    if (name == clusterfusion::name_of(dtype)) return dtype;
  }
  return std::nullopt;
}

bool names_checkpoint(const std::string& draft) {
  return !draft.empty() && draft != "none" && draft != "ngram";
}

}  // namespace

void add_model_options(CLI::App& app, ModelName& model, const std::string& what) {
  app.add_option("MODEL", model.name, what + ", or a name on its hub (owner/name)")
      ->required()
      ->type_name("");
  app.add_option("--revision", model.revision,
                 "branch, tag or commit of a name on the hub; main if not given")
      ->type_name("NAME");
}

void add_engine_options(CLI::App& app, EngineSettings& settings) {
  add_model_options(app, settings.model, "checkpoint folder in Hugging Face layout");
  app.add_option("--device", settings.options.device, "where to compute: auto, cpu or cuda")
      ->transform(one_of({"auto", "cpu", "cuda"}))
      ->type_name("NAME")
      ->capture_default_str();
  add_number(app, "--threads", settings.options.threads, "CPU threads; 0: one for each usable core",
             0)
      ->capture_default_str();
  app.add_option("--kv-dtype", settings.kv_dtype,
                 "type of the KV cache: float32, float16 or bfloat16; on a GPU the weights' type "
                 "or float32")
      ->transform(one_of({"float32", "float16", "bfloat16"}))
      ->type_name("NAME");
  app.add_option("--mode", settings.mode,
                 "what a GPU is to be quick at: latency (of one sequence) or throughput (of many)")
      ->transform(one_of({"latency", "throughput"}))
      ->type_name("NAME")
      ->capture_default_str();
}

void add_memory_options(CLI::App& app, EngineSettings& settings) {
  add_number(app, "--kv-bytes", settings.options.kv_bytes,
             "memory for keys and values; 0: on the CPU half of what is left, on a GPU most of it",
             std::int64_t{0})
      ->capture_default_str();
  add_number(app, "--max-sequences", settings.options.max_sequences,
             "texts that are computed together at most", std::int64_t{1})
      ->capture_default_str();
  app.add_flag_callback(
      "--no-prefix-cache", [&] { settings.options.prefix_cache = false; },
      "compute each prompt anew, also where one begins as another does");
}

void add_draft_options(CLI::App& app, EngineSettings& settings) {
  settings.options.draft = "none";
  app.add_option("--draft", settings.options.draft,
                 "who guesses tokens that are then computed together, for the same text in less "
                 "time: none, ngram (what the text has said before) or a smaller checkpoint with "
                 "the same tokens (folder or name on the hub)")
      ->type_name("MODEL")
      ->check([](const std::string& draft) {
        return draft.empty() ? "expected none, ngram or a checkpoint, found nothing" : "";
      })
      ->capture_default_str();
  add_number(app, "--draft-tokens", settings.options.draft_tokens,
             "tokens that it may guess at a time, 1 to 15; fewer where they do not pay", 1)
      ->capture_default_str();
}

void add_context_option(CLI::App& app, EngineSettings& settings) {
  add_number(app, "--context", settings.options.max_positions,
             "longest context in tokens; 0: the model's", std::int64_t{0})
      ->capture_default_str();
}

std::unique_ptr<Engine> open_engine(const EngineSettings& settings, const ReportSettings& report) {
  EngineOptions options = settings.options;
  options.kv_dtype = parse_dtype(settings.kv_dtype);
  options.mode = decode_mode_of(settings.mode).value_or(DecodeMode::latency);
  ProgressBar progress("loading", "MB", report.quiet, kLoadingPatience);
  options.load_progress = [&](std::int64_t done, std::int64_t total) {
    progress.update(done / 1'000'000, total / 1'000'000);
  };
  const std::filesystem::path folder =
      find_or_download(settings.model, CheckpointFiles::model, report.quiet);
  if (names_checkpoint(options.draft)) {
    options.draft = find_or_download({options.draft, ""}, CheckpointFiles::model, report.quiet);
  }
  std::unique_ptr<Engine> engine = Engine::open(folder, options);
  print_warnings(engine->warnings(), report.quiet);
  return engine;
}

void add_report_options(CLI::App& app, ReportSettings& settings) {
  app.add_flag("--json", settings.json, "print the result as one JSON document");
  app.add_flag("-q,--quiet", settings.quiet, "nothing on standard error but errors");
}

void print_warnings(const std::vector<std::string>& warnings, bool quiet) {
  if (quiet) return;
  for (const std::string& warning : warnings) print_warning(warning);
}

void warn_if_not_utf8(const std::string& text, const std::string& source, bool quiet) {
  const std::optional<std::size_t> at = first_ill_formed_byte(text);
  if (!at || quiet) return;
  print_warning(fmt::format(
      "the text from {} is not UTF-8: byte {} (0x{:02x}) and any other that does not belong to a "
      "character is read as U+FFFD",
      source, *at, static_cast<unsigned char>(text[*at])));
}

std::vector<TokenId> encode(const Tokenizer& tokenizer, const std::string& text,
                            bool add_special_tokens, const std::string& source, bool quiet) {
  warn_if_not_utf8(text, source, quiet);
  return tokenizer.encode(text, add_special_tokens);
}

}  // namespace clusterfusion::cli
