// Options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "cli/model_name.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion::cli {

struct EngineSettings {
  ModelName model;
  EngineOptions options;
  std::string kv_dtype;
  std::string mode = "latency";
};

// MODEL and --revision; `what` describes MODEL.
void add_model_options(CLI::App& app, ModelName& model, const std::string& what);
// MODEL, --revision, --device, --threads, --kv-dtype and --mode.
void add_engine_options(CLI::App& app, EngineSettings& settings);
// --context, the longest context, for the commands in which it means nothing else.
void add_context_option(CLI::App& app, EngineSettings& settings);
// --draft and --draft-tokens, for the commands that generate.
void add_draft_options(CLI::App& app, EngineSettings& settings);
// --kv-bytes, --max-sequences and --no-prefix-cache, for the commands that generate.
void add_memory_options(CLI::App& app, EngineSettings& settings);
struct ReportSettings {
  bool json = false;
  bool quiet = false;
};

// Shows how far loading is if it takes longer than a moment, and prints the engine's warnings.
// Errors: those of Engine::open.
std::unique_ptr<Engine> open_engine(const EngineSettings& settings, const ReportSettings& report);

// --json and --quiet.
void add_report_options(CLI::App& app, ReportSettings& settings);

void print_warnings(const std::vector<std::string>& warnings, bool quiet);

// The tokens of `text`; warns if it is not UTF-8 (`source` names it), unless `quiet`.
// Errors: out_of_memory.
std::vector<TokenId> encode(const Tokenizer& tokenizer, const std::string& text,
                            bool add_special_tokens, const std::string& source, bool quiet);
void warn_if_not_utf8(const std::string& text, const std::string& source, bool quiet);

}  // namespace clusterfusion::cli
