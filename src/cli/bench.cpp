// clusterfusion bench: how fast a model runs here, and how near that is to what memory allows.
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <random>

#include "base/fail.hpp"
#include "cli/chrome_trace.hpp"
#include "cli/commands.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/output_file.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/terminal.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

constexpr std::int64_t kDefaultContexts[] = {16, 128, 1024, 2047};
constexpr std::int64_t kDefaultTokensOnCpu = 32, kDefaultTokensOnGpu = 256;

struct BenchSettings {
  EngineSettings engine;
  ReportSettings report;
  std::string contexts;
  CLI::Option* contexts_option = nullptr;
  std::int64_t num_tokens = 0;
  int repeats = 3;
  std::uint64_t seed = 0;
  std::string timeline;
};

// What several repeats gave.
struct Spread {
  double median = 0;
  double min = 0;
  double max = 0;
};

struct ContextResult {
  std::int64_t context = 0;
  Spread prefill_tokens_per_second;
  Spread seconds_per_token;
  Spread bytes_per_second;
  double ceiling_share = 0;
};

Spread spread_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t half = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {median, values.front(), values.back()};
}

// The contexts that were asked for, or the usual ones as far as this model goes.
std::vector<std::int64_t> contexts_of(const BenchSettings& settings, std::int64_t max_positions) {
  // A step must fit behind the prompt.
  const std::int64_t longest = max_positions - 1;
  require(longest >= 1, ErrorKind::invalid_argument,
          "a context of {} leaves no room for a step behind a prompt; give a longer --context",
          format_count(max_positions, "position"));
  if (settings.contexts_option->count() > 0) {
    auto contexts = parse_integer_list(
        settings.contexts, 1, longest,
        fmt::format("--contexts (with a step behind each, in a context of {} positions)",
                    max_positions));
    require(!contexts.empty(), ErrorKind::invalid_argument,
            "--contexts: expected at least one number, found none");
    return contexts;
  }
  std::vector<std::int64_t> contexts;
  for (const std::int64_t context : kDefaultContexts) {
    contexts.push_back(std::min(context, longest));
    if (context >= longest) break;
  }
  return contexts;
}

std::int64_t num_tokens_of(const BenchSettings& settings, const EngineInfo& info) {
  if (settings.num_tokens > 0) return settings.num_tokens;
  return info.device == "cpu" ? kDefaultTokensOnCpu : kDefaultTokensOnGpu;
}

std::vector<TokenId> random_prompt(const Model& model, std::uint64_t seed, std::int64_t context) {
  std::mt19937_64 random(seed);
  const auto vocab_size = static_cast<std::uint64_t>(model.config().vocab_size);
  std::vector<TokenId> prompt(static_cast<std::size_t>(context));
  for (TokenId& token : prompt) token = static_cast<TokenId>(random() % vocab_size);
  return prompt;
}

ContextResult measure(Engine& engine, const BenchSettings& settings, std::int64_t context,
                      double ceiling, const std::function<void()>& on_repeat) {
  const std::vector<TokenId> prompt = random_prompt(engine.model(), settings.seed, context);
  const std::int64_t num_tokens = num_tokens_of(settings, engine.info());
  std::vector<double> prefill, decode, bytes;
  for (int repeat = 0; repeat < settings.repeats; ++repeat) {
    const DecodeTiming timing = engine.time_decode(prompt, num_tokens);
    prefill.push_back(double(context) / timing.prefill_seconds);
    for (const double seconds : timing.seconds_per_token) {
      decode.push_back(seconds);
      bytes.push_back(timing.bytes_per_token / seconds);
    }
    on_repeat();
  }
  ContextResult result{context, spread_of(prefill), spread_of(decode), spread_of(bytes), 0};
  result.ceiling_share = result.bytes_per_second.median / ceiling;
  return result;
}

std::string table_head(const Engine& engine, double ceiling) {
  return fmt::format(
      "{}\nreads at most {}/s (weights read without computing); one token reads {} of weights\n"
      "{:>8} {:>17} {:>19} {:>19} {:>11} {:>11} {:>11}\n",
      format_device(engine.info()), format_bytes(ceiling),
      format_bytes(double(engine.model().bytes_per_token())), "context", "prefill tokens/s",
      "decode median/token", "from ... to", "tokens/s", "read/s", "of ceiling");
}

std::string table_row(const ContextResult& result) {
  const Spread& decode = result.seconds_per_token;
  return fmt::format("{:>8} {:>17.1f} {:>19} {:>19} {:>11.2f} {:>11} {:>9.1f} %\n", result.context,
                     result.prefill_tokens_per_second.median, format_duration(decode.median),
                     format_duration(decode.min) + " ... " + format_duration(decode.max),
                     1 / decode.median, format_bytes(result.bytes_per_second.median),
                     100 * result.ceiling_share);
}

Json spread_json(const Spread& spread) {
  return {{"median", spread.median}, {"min", spread.min}, {"max", spread.max}};
}

Json bench_json(const Engine& engine, const BenchSettings& settings, double ceiling,
                const std::vector<ContextResult>& results) {
  const EngineInfo info = engine.info();
  Json json = {{"model", engine.model().folder().string()},
               {"dtype", clusterfusion::name_of(engine.model().config().dtype)},
               {"kv_dtype", clusterfusion::name_of(info.kv_dtype)},
               {"device", info.device},
               {"device_description", info.device_description},
               {"device_reason", info.device_reason},
               {"bytes_per_token", engine.model().bytes_per_token()},
               {"read_ceiling_bytes_per_second", ceiling},
               {"decode_tokens", num_tokens_of(settings, info)},
               {"repeats", settings.repeats},
               {"contexts", Json::array()}};
  for (const ContextResult& result : results) {
    json["contexts"].push_back(
        {{"context", result.context},
         {"prefill_tokens_per_second", spread_json(result.prefill_tokens_per_second)},
         {"seconds_per_token", spread_json(result.seconds_per_token)},
         {"bytes_per_second", spread_json(result.bytes_per_second)},
         {"ceiling_share", result.ceiling_share}});
  }
  return json;
}

// Of a step at the first context.
void write_timeline(Engine& engine, const BenchSettings& settings, std::int64_t context,
                    OutputFile& file) {
  const std::vector<TimelineEvent> events =
      engine.record_timeline(random_prompt(engine.model(), settings.seed, context));
  file.write(
      chrome_trace(events, fmt::format("{}, context {}, {}", engine.model().folder().string(),
                                       context, engine.info().device_description)));
}

ExitCode run(const BenchSettings& settings) {
  std::optional<OutputFile> timeline;
  if (!settings.timeline.empty()) timeline.emplace(settings.timeline, "--timeline");
  const std::unique_ptr<Engine> engine = open_engine(settings.engine, settings.report);
  const std::vector<std::int64_t> contexts = contexts_of(settings, engine->info().max_positions);
  if (timeline) write_timeline(*engine, settings, contexts.front(), *timeline);
  const double ceiling = engine->measure_read_ceiling();
  const std::int64_t num_runs = static_cast<std::int64_t>(contexts.size()) * settings.repeats;
  std::int64_t runs_done = 0;
  std::vector<ContextResult> results;
  {
    ProgressBar progress("bench", "runs", settings.report.quiet);
    progress.update(0, num_runs);
    for (const std::int64_t context : contexts) {
      results.push_back(measure(*engine, settings, context, ceiling,
                                [&] { progress.update(++runs_done, num_runs); }));
    }
  }
  if (settings.report.json) {
    write_output(to_line(bench_json(*engine, settings, ceiling, results)));
    return kDone;
  }
  write_output(table_head(*engine, ceiling));
  for (const ContextResult& result : results) write_output(table_row(result));
  return kDone;
}

}  // namespace

void add_bench_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<BenchSettings>();
  CLI::App& command = *add_command(
      app, selected, "bench", "Measure prefill and decode speed over contexts.", settings, &run,
      "For each context a prompt of that many random tokens is prefilled and --tokens more are\n"
      "decoded behind it, --repeats times, greedily, in bursts of up to 16; after each burst the\n"
      "sequence is cut back, so that it stays near the context (a burst ends with the context at\n"
      "the latest). Times are the host's; median, smallest and largest are of the bursts. The\n"
      "ceiling is measured first: reading all weights, computing nothing.\n\n"
      "--timeline writes what each SM of a GPU does in one step at the first context; open it in\n"
      "https://ui.perfetto.dev or chrome://tracing.\n\n"
      "Keys of --json: model, dtype, kv_dtype, device, device_description, device_reason,\n"
      "bytes_per_token, read_ceiling_bytes_per_second, decode_tokens, repeats, contexts (context,\n"
      "prefill_tokens_per_second, seconds_per_token, bytes_per_second: each median, min, max;\n"
      "ceiling_share).",
      "clusterfusion bench models/demo --contexts 16,64 --tokens 8");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  settings->contexts_option =
      command
          .add_option(
              "--contexts", settings->contexts,
              "prompt lengths in tokens (default: 16,128,1024,2047, as far as the model goes)")
          ->type_name("LIST");
  add_number(command, "-n,--tokens", settings->num_tokens,
             "tokens decoded after each prompt (default: 256 on a GPU, 32 on the CPU)",
             std::int64_t{1});
  command.add_option("--timeline", settings->timeline, "write a trace of one step to this file")
      ->type_name("FILE");
  add_number(command, "--repeats", settings->repeats, "runs for each context", 1)
      ->capture_default_str();
  add_number(command, "--seed", settings->seed, "of the random prompts")->capture_default_str();
  add_report_options(command, settings->report);
}

}  // namespace clusterfusion::cli
