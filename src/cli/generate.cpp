// clusterfusion generate: a prompt in, a stream of text out.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <deque>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/interrupt.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/terminal.hpp"
#include "cli/text_source.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

// Weights up to this size are read so fast (some milliseconds) that the read ceiling is measured
// after each generation without asking.
constexpr std::int64_t kQuickCeilingBytes = std::int64_t{64} << 20;

struct GenerateSettings {
  EngineSettings engine;
  ReportSettings report;
  TextSource prompt;
  std::string logit_bias;
  std::string prompt_cache;  // a file; empty: none
  std::string prompt_tokens;
  CLI::Option* prompt_tokens_option = nullptr;
  std::string stop_tokens;
  CLI::Option* stop_tokens_option = nullptr;
  GenerateRequest request;
  // Options that count before generation_config.json: each with what it sets.
  struct Override {
    const CLI::Option* option;
    std::function<void(const GenerateRequest& given, GenerateRequest& request)> copy;
  };
  std::vector<Override> overrides;
  bool generation_config = false;
  bool json_lines = false;
  bool echo = false;
  bool no_special_tokens = false;
  bool show_special_tokens = false;
  bool no_stats = false;
  bool ceiling = false;
};

std::vector<TokenId> parse_tokens(const std::string& list, std::string_view option) {
  const auto ids = parse_integer_list(list, 0, std::numeric_limits<TokenId>::max(), option);
  require(!ids.empty(), ErrorKind::invalid_argument,
          "{}: expected at least one token id, as in 0,50, found none", option);
  return {ids.begin(), ids.end()};
}

// "ID=BIAS", separated by commas or white space.
std::vector<TokenBias> parse_logit_bias(const std::string& list) {
  constexpr std::string_view kSeparators = ", \t\n";
  std::vector<TokenBias> biases;
  for (std::string_view rest = list;;) {
    const std::size_t begin = rest.find_first_not_of(kSeparators);
    if (begin == rest.npos) return biases;
    rest.remove_prefix(begin);
    const std::string_view entry = rest.substr(0, rest.find_first_of(kSeparators));
    const std::size_t equals = entry.find('=');
    const auto token = parse_number<TokenId>(entry.substr(0, equals));
    const auto bias =
        equals == entry.npos ? std::nullopt : parse_number<float>(entry.substr(equals + 1));
    require(token && *token >= 0 && bias, ErrorKind::invalid_argument,
            "--logit-bias: entry {} is \"{}\"; expected a token id and a number, as in 50=-2.5",
            biases.size(), entry.substr(0, 40));
    biases.push_back({*token, *bias});
    rest.remove_prefix(entry.size());
  }
}

// Editors and `echo` end a text with a newline that is no part of the prompt.
void drop_final_newline(std::string& text) {
  if (text.ends_with('\n')) text.pop_back();
  if (text.ends_with('\r')) text.pop_back();
}

// Reads and checks all that can be known before the model is opened.
GenerateRequest make_request(const GenerateSettings& settings) {
  GenerateRequest request = settings.request;
  request.sampling.logit_bias = parse_logit_bias(settings.logit_bias);
  request.sampling.validate();
  require(request.sampling.num_logprobs < 0 || settings.report.json || settings.json_lines,
          ErrorKind::invalid_argument,
          "--logprobs needs a place to show them: add --json or --json-lines");
  for (const std::string& stop : request.stop_strings) {
    require(!stop.empty(), ErrorKind::invalid_argument,
            "--stop: expected at least one character, found \"\"");
  }
  request.add_special_tokens = !settings.no_special_tokens;
  request.skip_special_tokens = !settings.show_special_tokens;
  if (settings.stop_tokens_option->count() > 0) {
    request.stop_tokens = parse_tokens(settings.stop_tokens, "--stop-tokens");
  }
  if (settings.prompt_tokens_option->count() > 0) {
    request.prompt_tokens = parse_tokens(settings.prompt_tokens, "--prompt-tokens");
    return request;
  }
  request.prompt = read_text(settings.prompt);
  if (!is_typed(settings.prompt)) {
    drop_final_newline(request.prompt);
    require(!request.prompt.empty(), ErrorKind::invalid_argument,
            "the prompt from {} is one empty line; expected at least one character",
            name_of(settings.prompt));
  }
  warn_if_not_utf8(request.prompt, name_of(settings.prompt), settings.report.quiet);
  return request;
}

// Writes the events of one generation to standard output as they come.
class EventWriter {
 public:
  EventWriter(const GenerateSettings& settings, const Tokenizer* tokenizer)
      : settings_(settings), tokenizer_(tokenizer) {
    if (settings.report.json) progress_.emplace("generating", "tokens", settings.report.quiet);
  }

  void begin(const GenerateRequest& request) {
    if (!settings_.echo) return;
    if (request.prompt_tokens.empty()) {
      write_output(request.prompt);
    } else if (tokenizer_ != nullptr) {
      write_output(tokenizer_->decode(request.prompt_tokens, request.skip_special_tokens));
    } else {
      write_output(fmt::format("{} ", fmt::join(request.prompt_tokens, " ")));
    }
    flush_output();
  }

  // Samples come one after the other.
  void write(const GenerateEvent& event) {
    if (has_samples() && !settings_.json_lines && !settings_.report.json &&
        sample_ != event.index) {
      sample_ = event.index;
      write_output(fmt::format("{}--- sample {} ---\n", event.index > 0 ? "\n" : "", event.index));
    }
    if (settings_.json_lines) {
      write_output(to_line(event_json(event)));
    } else if (settings_.report.json) {
      num_tokens_ += event.token.has_value();
      progress_->update(num_tokens_, settings_.request.n * settings_.request.max_new_tokens);
      return;
    } else if (tokenizer_ != nullptr) {
      write_output(event.text);
    } else if (event.token) {
      write_output(fmt::format("{} ", event.token->token));
    }
    flush_output();
  }

  void end(std::span<const GenerateResult> results) {
    progress_.reset();
    if (settings_.json_lines) {
      for (std::size_t i = 0; i < results.size(); ++i) {
        Json json = {{"event", "end"}};
        if (has_samples()) json["sample"] = i;
        json.update(to_json(results[i], tokenizer_));
        write_output(to_line(json));
      }
    } else if (settings_.report.json && has_samples()) {
      Json samples = Json::array();
      for (const GenerateResult& result : results) samples.push_back(to_json(result, tokenizer_));
      write_output(to_line({{"samples", samples}}));
    } else if (settings_.report.json) {
      write_output(to_line(to_json(results.front(), tokenizer_)));
    } else {
      write_output("\n");
    }
    flush_output();
  }

  // What was streamed stays; an error message then starts on a line of its own.
  void abandon() {
    if (!settings_.json_lines && !settings_.report.json) write_output("\n");
    flush_output();
  }

 private:
  bool has_samples() const { return settings_.request.n > 1; }

  Json event_json(const GenerateEvent& event) const {
    Json json = {{"event", "token"}, {"text", event.text}};
    if (has_samples()) json["sample"] = event.index;
    if (event.token) {
      const bool with_logprob = settings_.request.sampling.num_logprobs >= 0;
      json.update(to_json(*event.token, tokenizer_, with_logprob));
    }
    return json;
  }

  const GenerateSettings& settings_;
  const Tokenizer* const tokenizer_;
  std::optional<ProgressBar> progress_;
  std::int64_t num_tokens_ = 0;
  std::optional<std::size_t> sample_;  // whose text is being written
};

// The events of samples that are computed together, one sample after the other.
void write_in_order(Generation& generation, std::int32_t samples, EventWriter& writer) {
  std::vector<std::deque<GenerateEvent>> held(static_cast<std::size_t>(samples));
  std::size_t current = 0;
  while (auto event = generation.next()) {
    held[event->index].push_back(std::move(*event));
    while (current < held.size() && !held[current].empty()) {
      const GenerateEvent first = std::move(held[current].front());
      held[current].pop_front();
      writer.write(first);
      if (first.finish_reason) ++current;
    }
  }
}

// Adds the read ceiling to the statistics if it is asked for, or costs next to nothing. Whoever
// pressed Ctrl-C does not want to wait for it.
void add_read_ceiling(Engine& engine, const GenerateSettings& settings, GenerateResult& result) {
  Statistics& statistics = result.statistics;
  const bool quick = engine.model().bytes_per_token() <= kQuickCeilingBytes;
  const bool wanted = settings.ceiling && result.finish_reason != FinishReason::cancelled;
  if (statistics.bytes_per_second <= 0 || !(wanted || quick)) return;
  statistics.read_ceiling_bytes_per_second = engine.measure_read_ceiling();
  statistics.ceiling_share = statistics.bytes_per_second / statistics.read_ceiling_bytes_per_second;
}

// The request with the checkpoint's own defaults where the command line says nothing.
GenerateRequest with_generation_config(const GenerateSettings& settings, const Model& model,
                                       const GenerateRequest& given) {
  GenerateRequest request = given;
  apply_generation_config(model.generation_config(), request);
  for (const GenerateSettings::Override& override : settings.overrides) {
    if (override.option->count() > 0) override.copy(given, request);
  }
  return request;
}

// Loads the beginning of the prompt from the file, or reads the prompt and makes the file.
void use_prompt_cache(Engine& engine, const GenerateSettings& settings,
                      const GenerateRequest& request) {
  const std::vector<TokenId> prompt =
      request.prompt_tokens.empty()
          ? engine.tokenizer().encode(request.prompt, request.add_special_tokens)
          : request.prompt_tokens;
  std::error_code unknown;
  const bool exists = std::filesystem::exists(settings.prompt_cache, unknown);
  const InterruptScope interrupt;
  const std::int64_t tokens = exists ? engine.load_prompt_cache(settings.prompt_cache, prompt)
                                     : engine.save_prompt_cache(prompt, settings.prompt_cache);
  if (settings.report.quiet || settings.no_stats) return;
  write_stderr(fmt::format("prompt cache: {} of {} tokens {} {}\n", tokens, prompt.size(),
                           exists ? "loaded from" : "saved to", settings.prompt_cache));
}

ExitCode run(const GenerateSettings& settings) {
  GenerateRequest request = make_request(settings);
  EngineSettings engine_settings = settings.engine;
  bool is_reading_prompt = false;
  // Once a text has begun, a signal cancels it instead.
  engine_settings.options.interrupted = [&] { return is_reading_prompt && signal_noted(); };
  const std::unique_ptr<Engine> engine = open_engine(engine_settings, settings.report);
  if (settings.generation_config) {
    request = with_generation_config(settings, engine->model(), request);
  }
  if (!settings.prompt_cache.empty()) {
    is_reading_prompt = true;
    use_prompt_cache(*engine, settings, request);
    is_reading_prompt = false;
  }
  EventWriter writer(settings, engine->has_tokenizer() ? &engine->tokenizer() : nullptr);
  const std::unique_ptr<Generation> generation = engine->start({request});
  {
    const InterruptScope interrupt(generation.get());
    writer.begin(request);
    try {
      write_in_order(*generation, request.n, writer);
    } catch (const Error&) {
      writer.abandon();
      throw;
    }
  }
  std::vector<GenerateResult> results = generation->results();
  const bool with_statistics = !settings.report.quiet && !settings.no_stats;
  if (with_statistics || settings.report.json || settings.json_lines) {
    for (GenerateResult& result : results) add_read_ceiling(*engine, settings, result);
  }
  writer.end(results);
  if (with_statistics) {
    write_stderr(fmt::format("device: {}\n", format_device(engine->info())));
    for (const GenerateResult& result : results) {
      write_stderr(format_statistics(result.statistics, name_of(*result.finish_reason)));
    }
  }
  const bool cancelled = std::ranges::any_of(results, [](const GenerateResult& result) {
    return result.finish_reason == FinishReason::cancelled;
  });
  return cancelled ? exit_code_of_signal() : kDone;
}

// An option that sets `member` of the sampling parameters.
template <typename T>
void add_sampling(CLI::App& app, GenerateSettings& settings, const std::string& names,
                  T SamplingParams::*member, const std::string& description) {
  const CLI::Option* option =
      add_number(app, names, settings.request.sampling.*member, description)->capture_default_str();
  settings.overrides.push_back(
      {option, [member](const GenerateRequest& given, GenerateRequest& request) {
         request.sampling.*member = given.sampling.*member;
       }});
}

void add_sampling_options(CLI::App& app, GenerateSettings& settings) {
  add_sampling(app, settings, "--temperature", &SamplingParams::temperature,
               "0: always the likeliest token");
  add_sampling(app, settings, "--top-k", &SamplingParams::top_k,
               "choose among the k likeliest tokens; 0: all");
  add_sampling(app, settings, "--top-p", &SamplingParams::top_p,
               "choose among the likeliest tokens that sum to this probability");
  add_sampling(app, settings, "--min-p", &SamplingParams::min_p,
               "drop tokens less likely than this share of the likeliest");
  add_sampling(app, settings, "--repetition-penalty", &SamplingParams::repetition_penalty,
               "above 1: make tokens of the text so far less likely");
  add_sampling(app, settings, "--frequency-penalty", &SamplingParams::frequency_penalty,
               "above 0: lower a token's score by this for each time that it stands in the text");
  add_sampling(app, settings, "--presence-penalty", &SamplingParams::presence_penalty,
               "above 0: lower it by this once");
  add_sampling(app, settings, "--no-repeat-ngram-size", &SamplingParams::no_repeat_ngram_size,
               "never repeat so many tokens in a row; 0: any may");
  app.add_option("--logit-bias", settings.logit_bias,
                 "add to the scores of token ids, as in 50=-100,7=2.5")
      ->type_name("LIST");
  app.add_flag("--allow-padded-ids", settings.request.allow_padded_ids,
               "let ids be drawn that the tokenizer does not know");
  add_number(app, "--seed", settings.request.sampling.seed, "the same seed gives the same text")
      ->capture_default_str();
  add_number(app, "--num-samples", settings.request.n,
             "texts of the prompt, with --seed, --seed + 1 and so on", std::int32_t{1})
      ->capture_default_str();
  add_number(app, "--logprobs", settings.request.sampling.num_logprobs,
             "log-probabilities of each token and the N likeliest (with --json)", std::int32_t{0});
  app.add_flag("--generation-config", settings.generation_config,
               "take from the folder's generation_config.json what no option says");
}

void add_stop_options(CLI::App& app, GenerateSettings& settings) {
  const CLI::Option* max_new_tokens =
      add_number(app, "-n,--max-new-tokens", settings.request.max_new_tokens, "tokens to generate",
                 std::int64_t{0})
          ->capture_default_str();
  settings.overrides.push_back(
      {max_new_tokens, [](const GenerateRequest& given, GenerateRequest& request) {
         request.max_new_tokens = given.max_new_tokens;
       }});
  add_number(app, "--min-new-tokens", settings.request.min_new_tokens,
             "draw no token that ends the text before there are so many", std::int64_t{0})
      ->capture_default_str();
  app.add_option("--stop", settings.request.stop_strings,
                 "end before this text, taken as it is typed (a newline in bash: $'\\n'); may be "
                 "given several times")
      ->type_name("TEXT")
      ->allow_extra_args(false);
  settings.stop_tokens_option = app.add_option("--stop-tokens", settings.stop_tokens,
                                               "end at any of these token ids, as in 0,50")
                                    ->type_name("IDS");
  app.add_flag("--ignore-eos", settings.request.ignore_eos,
               "do not end at the model's end-of-text tokens");
}

}  // namespace

void add_generate_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<GenerateSettings>();
  CLI::App& command = *add_command(
      app, selected, "generate", "Continue a prompt, streaming the text as it comes.", settings,
      &run,
      "The text goes to standard output, followed by a newline; statistics go to standard error.\n"
      "Of a prompt from a file or standard input one final newline is dropped.\n"
      "Ctrl-C ends the text with its statistics and exit code 130; a second one kills.\n"
      "A folder without tokenizer.json takes --prompt-tokens and gives token ids.\n"
      "With --prompt-cache a long prompt is read once: later ones that begin as it did, and may "
      "be\n"
      "longer, take that from the file. It has to be of the same model, --kv-dtype and device.\n"
      "Of a folder's generation_config.json only the end-of-text tokens count; "
      "--generation-config\n"
      "takes its temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens as\n"
      "transformers' generate() does, where no option says otherwise.\n\n"
      "Keys of --json: text, prompt_tokens, tokens, finish_reason, logprobs, statistics;\n"
      "with several samples a list of these under \"samples\".\n"
      "--json-lines prints {\"event\": \"token\", text, token, piece, ...} for each token and\n"
      "{\"event\": \"end\", ...} with the keys of --json as the last line; with several samples\n"
      "one for each, and its number as \"sample\" in every line.",
      "clusterfusion generate models/demo -p \"It was a dark night\" -n 48 --temperature 0.8 "
      "--seed 1");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  add_memory_options(command, settings->engine);
  add_draft_options(command, settings->engine);
  add_text_options(command, settings->prompt, "--prompt", "--prompt-file");
  settings->prompt_tokens_option = command
                                       .add_option("--prompt-tokens", settings->prompt_tokens,
                                                   "the prompt as token ids, as in 1,2,3")
                                       ->type_name("IDS")
                                       ->excludes(settings->prompt.text_option)
                                       ->excludes(settings->prompt.file_option);
  command
      .add_option("--prompt-cache", settings->prompt_cache,
                  "keys and values of the prompt's beginning: made if there is no such file, else "
                  "loaded instead of read again")
      ->type_name("FILE")
      ->check([](const std::string& file) {
        return file.empty() ? std::string("expected the name of a file") : std::string();
      })
      ->excludes("--no-prefix-cache");
  add_stop_options(command, *settings);
  add_sampling_options(command, *settings);
  add_report_options(command, settings->report);
  command.add_flag("--json-lines", settings->json_lines, "print one JSON document for each token")
      ->excludes("--json");
  command.add_flag("--echo", settings->echo, "print the prompt first")
      ->excludes("--json")
      ->excludes("--json-lines");
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens to the prompt");
  command.add_flag("--show-special-tokens", settings->show_special_tokens,
                   "show special tokens in the text");
  command.add_flag("--no-stats", settings->no_stats, "no statistics");
  command.add_flag("--ceiling", settings->ceiling,
                   "measure the read ceiling of a large model too (takes a while)");
}

}  // namespace clusterfusion::cli
