// clusterfusion bench: how fast a model runs here, and how near that is to what memory allows.
#include <fmt/format.h>

#include <algorithm>
#include <random>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/progress.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/terminal.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

constexpr std::string_view kDefaultContexts = "16,128,1024";

struct Settings {
  EngineSettings engine;
  ReportSettings report;
  std::string contexts;
  CLI::Option* contexts_option = nullptr;
  std::int64_t num_tokens = 32;
  int repeats = 3;
  std::uint64_t seed = 0;
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

// The contexts that were asked for, or those of the default that this model can hold.
std::vector<std::int64_t> contexts_of(const Settings& settings, std::int64_t max_positions) {
  // The first of num_tokens + 1 tokens comes from the prefill; the last needs no position.
  const std::int64_t longest = max_positions - settings.num_tokens;
  require(longest >= 1, ErrorKind::invalid_argument,
          "--tokens: {} do not fit behind a prompt into the context of {} positions; give fewer",
          settings.num_tokens, max_positions);
  if (settings.contexts_option->count() > 0) {
    auto contexts = parse_integer_list(settings.contexts, 1, longest,
                                       fmt::format("--contexts (with {} tokens after each, in a "
                                                   "context of {} positions)",
                                                   settings.num_tokens, max_positions));
    require(!contexts.empty(), ErrorKind::invalid_argument,
            "--contexts: expected at least one number, found none");
    return contexts;
  }
  auto contexts = parse_integer_list(kDefaultContexts, 1, 1024, "--contexts");
  std::erase_if(contexts, [&](std::int64_t context) { return context > longest; });
  if (contexts.empty()) contexts.push_back(longest);
  return contexts;
}

GenerateRequest synthetic_request(const Model& model, const Settings& settings,
                                  std::int64_t context) {
  std::mt19937_64 random(settings.seed);
  GenerateRequest request;
  request.ignore_eos = true;
  request.max_new_tokens = settings.num_tokens + 1;
  const auto vocab_size = static_cast<std::uint64_t>(model.config().vocab_size);
  for (std::int64_t i = 0; i < context; ++i) {
    request.prompt_tokens.push_back(static_cast<TokenId>(random() % vocab_size));
  }
  return request;
}

ContextResult measure(Engine& engine, const Settings& settings, std::int64_t context,
                      double ceiling, const std::function<void()>& on_repeat) {
  const GenerateRequest request = synthetic_request(engine.model(), settings, context);
  std::vector<double> prefill, decode, bytes;
  for (int repeat = 0; repeat < settings.repeats; ++repeat) {
    const Statistics statistics = engine.generate(request).statistics;
    prefill.push_back(double(context) / statistics.prefill_seconds);
    decode.push_back(statistics.seconds_per_token);
    bytes.push_back(statistics.bytes_per_second);
    on_repeat();
  }
  ContextResult result{context, spread_of(prefill), spread_of(decode), spread_of(bytes), 0};
  result.ceiling_share = result.bytes_per_second.median / ceiling;
  return result;
}

std::string table_head(const Engine& engine, double ceiling) {
  const EngineInfo info = engine.info();
  return fmt::format(
      "{}: {}\nreads at most {}/s (weights read without computing); one token reads {} of weights\n"
      "{:>8} {:>17} {:>19} {:>9} {:>11} {:>11} {:>11}\n",
      info.device, info.device_description, format_bytes(ceiling),
      format_bytes(double(engine.model().bytes_per_token())), "context", "prefill tokens/s",
      "decode median/token", "spread", "tokens/s", "read/s", "of ceiling");
}

std::string table_row(const ContextResult& result) {
  const Spread& decode = result.seconds_per_token;
  return fmt::format("{:>8} {:>17.1f} {:>19} {:>7.1f} % {:>11.2f} {:>11} {:>9.1f} %\n",
                     result.context, result.prefill_tokens_per_second.median,
                     format_duration(decode.median),
                     100 * (decode.max - decode.min) / decode.median, 1 / decode.median,
                     format_bytes(result.bytes_per_second.median), 100 * result.ceiling_share);
}

Json to_json(const Spread& spread) {
  return {{"median", spread.median}, {"min", spread.min}, {"max", spread.max}};
}

Json to_json(const Engine& engine, const Settings& settings, double ceiling,
             const std::vector<ContextResult>& results) {
  const EngineInfo info = engine.info();
  Json json = {{"model", engine.model().folder().string()},
               {"dtype", clusterfusion::name_of(engine.model().config().dtype)},
               {"kv_dtype", clusterfusion::name_of(info.kv_dtype)},
               {"device", info.device},
               {"device_description", info.device_description},
               {"bytes_per_token", engine.model().bytes_per_token()},
               {"read_ceiling_bytes_per_second", ceiling},
               {"decode_tokens", settings.num_tokens},
               {"repeats", settings.repeats},
               {"contexts", Json::array()}};
  for (const ContextResult& result : results) {
    json["contexts"].push_back(
        {{"context", result.context},
         {"prefill_tokens_per_second", to_json(result.prefill_tokens_per_second)},
         {"seconds_per_token", to_json(result.seconds_per_token)},
         {"bytes_per_second", to_json(result.bytes_per_second)},
         {"ceiling_share", result.ceiling_share}});
  }
  return json;
}

ExitCode run(const Settings& settings) {
  const std::unique_ptr<Engine> engine = open_engine(settings.engine);
  const std::vector<std::int64_t> contexts = contexts_of(settings, engine->info().max_positions);
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
    write_output(to_line(to_json(*engine, settings, ceiling, results)));
    return kDone;
  }
  write_output(table_head(*engine, ceiling));
  for (const ContextResult& result : results) write_output(table_row(result));
  return kDone;
}

}  // namespace

void add_bench_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<Settings>();
  CLI::App& command = *add_command(
      app, selected, "bench", "Measure prefill and decode speed over contexts.", settings, &run,
      "For each context a prompt of that many random tokens is prefilled and --tokens more are\n"
      "decoded, --repeats times; the median and the spread (longest less shortest, in % of the\n"
      "median) are shown. The ceiling is measured first: reading all weights, computing "
      "nothing.\n\n"
      "Keys of --json: model, dtype, kv_dtype, device, device_description, bytes_per_token,\n"
      "read_ceiling_bytes_per_second, decode_tokens, repeats, contexts (context,\n"
      "prefill_tokens_per_second, seconds_per_token, bytes_per_second: each median, min, max;\n"
      "ceiling_share).",
      "clusterfusion bench models/demo --contexts 16,64 --tokens 8");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  settings->contexts_option =
      command
          .add_option("--contexts", settings->contexts,
                      "prompt lengths in tokens (default: those of 16,128,1024 that fit)")
          ->type_name("LIST");
  add_number(command, "-n,--tokens", settings->num_tokens, "tokens decoded after each prompt",
             std::int64_t{1})
      ->capture_default_str();
  add_number(command, "--repeats", settings->repeats, "runs for each context", 1)
      ->capture_default_str();
  add_number(command, "--seed", settings->seed, "of the random prompts")->capture_default_str();
  add_report_options(command, settings->report);
}

}  // namespace clusterfusion::cli
