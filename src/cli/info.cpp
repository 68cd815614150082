// clusterfusion info: what a checkpoint is, and what runs it.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/options.hpp"
#include "cli/report_format.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {
namespace {

struct InfoSettings {
  EngineSettings engine;
  ReportSettings report;
  bool check = false;
};

std::int64_t count_special(const Tokenizer& tokenizer) {
  std::int64_t count = 0;
  for (TokenId token = 0; token < tokenizer.vocab_size(); ++token) {
    count += tokenizer.is_special(token);
  }
  return count;
}

Json model_json(const Model& model) {
  const ModelConfig& config = model.config();
  return {
      {"path", model.folder().string()},
      {"model_type", config.model_type},
      {"dtype", clusterfusion::name_of(config.dtype)},
      {"num_parameters", model.num_parameters()},
      {"total_bytes", model.total_bytes()},
      {"bytes_per_token", model.bytes_per_token()},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"num_layers", config.num_layers},
      {"num_heads", config.num_heads},
      {"num_kv_heads", config.kv_heads()},
      {"head_dim", config.head_dim},
      {"intermediate_size", config.intermediate_size},
      {"max_positions", config.max_positions},
      {"sliding_window", config.sliding_window},
      {"rotary_dim", config.rotary_dim},
      {"rope_theta", config.rope_theta},
      {"rope_type", clusterfusion::name_of(config.rope_scaling.kind)},
      {"layer_norm_eps", config.layer_norm_eps},
      {"hidden_act", config.hidden_act},
      {"parallel_residual", config.parallel_residual},
      {"attention_bias", config.attention_bias},
      {"tied_embeddings", config.tied_embeddings},
      {"bos_token", config.bos_token ? Json(*config.bos_token) : Json()},
      {"eos_tokens", config.eos_tokens},
  };
}

Json engine_json(const Engine& engine) {
  const EngineInfo info = engine.info();
  Json json = {{"model", model_json(engine.model())}, {"tokenizer", nullptr}};
  if (engine.has_tokenizer()) {
    const Tokenizer& tokenizer = engine.tokenizer();
    json["tokenizer"] = {{"vocab_size", tokenizer.vocab_size()},
                         {"special_tokens", count_special(tokenizer)}};
  }
  json["device"] = {{"name", info.device},
                    {"description", info.device_description},
                    {"reason", info.device_reason},
                    {"kv_dtype", clusterfusion::name_of(info.kv_dtype)},
                    {"kv_bytes_per_position", info.kv_bytes_per_position},
                    {"max_positions", info.max_positions}};
  return json;
}

// "9 heads over 3 of size 64, rotary size 64, base 10000, norms of queries and keys"
std::string attention_text(const ModelConfig& config) {
  const bool is_grouped = config.kv_heads() != config.num_heads;
  const bool is_scaled = config.rope_scaling.kind != RopeKind::plain;
  return fmt::format(
      "{}{} of size {}, rotary size {}, base {}{}{}{}", format_count(config.num_heads, "head"),
      is_grouped ? fmt::format(" over {}", config.kv_heads()) : "", config.head_dim,
      config.rotary_dim, config.rope_theta,
      is_scaled ? fmt::format(" ({})", clusterfusion::name_of(config.rope_scaling.kind)) : "",
      config.qk_norm ? ", norms of queries and keys" : "",
      config.attention_bias ? "" : ", no biases");
}

std::string model_text(const Model& model) {
  const ModelConfig& config = model.config();
  return fmt::format(
      "model       {}\n"
      "weights     {}, {}, {}; one token reads {}\n"
      "layers      {}, {} residual, hidden size {}, {}MLP {} ({})\n"
      "attention   {}\n"
      "vocabulary  {}, {} output embedding\n"
      "context     {}\n",
      model.folder().string(), format_count(model.num_parameters(), "parameter"),
      clusterfusion::name_of(config.dtype), format_bytes(double(model.total_bytes())),
      format_bytes(double(model.bytes_per_token())), config.num_layers,
      config.parallel_residual ? "parallel" : "sequential", config.hidden_size,
      config.gated_mlp ? "gated " : "", config.intermediate_size, config.hidden_act,
      attention_text(config), format_count(config.vocab_size, "token"),
      config.tied_embeddings ? "tied" : "own", format_count(config.max_positions, "position"));
}

std::string engine_text(const Engine& engine) {
  const EngineInfo info = engine.info();
  std::string tokenizer = "none (tokenizer.json is missing): token ids only";
  if (engine.has_tokenizer()) {
    tokenizer = fmt::format("{}, {} of them special",
                            format_count(engine.tokenizer().vocab_size(), "token"),
                            count_special(engine.tokenizer()));
  }
  return fmt::format(
      "{}end of text {}\ntokenizer   {}\ndevice      {}\nKV cache    {}, {} a position, {} at "
      "most\n",
      model_text(engine.model()), fmt::join(engine.model().config().eos_tokens, ", "), tokenizer,
      format_device(info), clusterfusion::name_of(info.kv_dtype),
      format_bytes(double(info.kv_bytes_per_position)),
      format_count(info.max_positions, "position"));
}

ExitCode run(const InfoSettings& settings) {
  const std::unique_ptr<Engine> engine = open_engine(settings.engine, settings.report);
  if (settings.check) {
    const std::optional<std::string> finding = engine->model().find_non_finite();
    require(!finding, ErrorKind::non_finite,
            "the weights must be finite, found {}; get the "
            "checkpoint again",
            finding.value_or(""));
  }
  write_output(settings.report.json ? to_line(engine_json(*engine)) : engine_text(*engine));
  return kDone;
}

}  // namespace

void add_info_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<InfoSettings>();
  CLI::App& command = *add_command(
      app, selected, "info", "Describe a checkpoint and the device that runs it.", settings, &run,
      "Keys of --json: model (shape, dtype, num_parameters, total_bytes, "
      "bytes_per_token, ...),\n"
      "tokenizer (vocab_size, special_tokens) or null, device (name, description, "
      "reason,\nkv_dtype, kv_bytes_per_position, max_positions).",
      "clusterfusion info models/demo");
  add_engine_options(command, settings->engine);
  add_context_option(command, settings->engine);
  add_report_options(command, settings->report);
  command.add_flag("--check", settings->check,
                   "read all weights and fail if one is NaN or infinite");
}

}  // namespace clusterfusion::cli
