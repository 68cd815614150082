// clusterfusion tokenize: text to token ids and back.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/fail.hpp"
#include "cli/commands.hpp"
#include "cli/number.hpp"
#include "cli/options.hpp"
#include "cli/result_json.hpp"
#include "cli/standard_output.hpp"
#include "cli/terminal.hpp"
#include "cli/text_source.hpp"
#include "cli/token_text.hpp"
#include "clusterfusion/tokenizer.hpp"

namespace clusterfusion::cli {
namespace {

struct TokenizeSettings {
  ModelName model;
  ReportSettings report;
  TextSource source;
  bool decode = false;
  bool count = false;
  bool pieces = false;
  bool no_special_tokens = false;
  bool skip_special_tokens = false;
};

Json tokens_json(const std::vector<TokenId>& tokens, const Tokenizer& tokenizer) {
  Json pieces = Json::array();
  for (const TokenId token : tokens) pieces.push_back(tokenizer.id_to_token(token));
  return {{"count", tokens.size()}, {"tokens", tokens}, {"pieces", std::move(pieces)}};
}

std::string piece_table(const std::vector<TokenId>& tokens, const Tokenizer& tokenizer) {
  std::string table;
  for (const TokenId token : tokens) {
    table += fmt::format("{:>8}  {}\n", token, quote(tokenizer.bytes_of(token)));
  }
  return table;
}

void run_encode(const TokenizeSettings& settings, const Tokenizer& tokenizer,
                const std::string& text) {
  const std::vector<TokenId> tokens = encode(tokenizer, text, !settings.no_special_tokens,
                                             name_of(settings.source), settings.report.quiet);
  if (settings.report.json) {
    write_output(to_line(tokens_json(tokens, tokenizer)));
  } else if (settings.count) {
    write_output(fmt::format("{}\n", tokens.size()));
  } else if (settings.pieces) {
    write_output(piece_table(tokens, tokenizer));
  } else {
    write_output(fmt::format("{}\n", fmt::join(tokens, " ")));
  }
}

// A model's vocabulary may be padded; ids that the tokenizer does not know have no text.
void warn_of_unknown(const std::vector<TokenId>& tokens, const Tokenizer& tokenizer, bool quiet) {
  const auto is_unknown = [&](TokenId token) { return token >= tokenizer.vocab_size(); };
  const auto first = std::ranges::find_if(tokens, is_unknown);
  if (first == tokens.end() || quiet) return;
  print_warning(
      fmt::format("{} of {} ids are not in the tokenizer's vocabulary of {} and have no "
                  "text; the first of them is {} at index {}",
                  std::ranges::count_if(tokens, is_unknown), tokens.size(), tokenizer.vocab_size(),
                  *first, first - tokens.begin()));
}

void run_decode(const TokenizeSettings& settings, const Tokenizer& tokenizer,
                const std::string& list) {
  const auto ids = parse_integer_list(list, 0, std::numeric_limits<TokenId>::max(),
                                      "token ids from " + name_of(settings.source));
  const std::vector<TokenId> tokens(ids.begin(), ids.end());
  warn_of_unknown(tokens, tokenizer, settings.report.quiet);
  const std::string text = tokenizer.decode(tokens, settings.skip_special_tokens);
  if (settings.report.json) {
    write_output(to_line({{"text", text}}));
    return;
  }
  write_output(text);
  // A pipe gets the text and nothing else, so that it can be compared with what was encoded.
  if (stdout_is_terminal()) write_output("\n");
}

ExitCode run(const TokenizeSettings& settings) {
  const std::string text = read_text(settings.source);
  const std::shared_ptr<const Tokenizer> tokenizer = Tokenizer::open(
      find_or_download(settings.model, CheckpointFiles::tokenizer, settings.report.quiet));
  print_warnings(tokenizer->warnings(), settings.report.quiet);
  (settings.decode ? run_decode : run_encode)(settings, *tokenizer, text);
  return kDone;
}

}  // namespace

void add_tokenize_command(CLI::App& app, Command& selected) {
  const auto settings = std::make_shared<TokenizeSettings>();
  CLI::App& command = *add_command(
      app, selected, "tokenize", "Turn text into token ids, or token ids into text.", settings,
      &run,
      "Prints the ids on one line. With --decode the text that is read holds ids, separated by\n"
      "white space or commas, and the text that they stand for is printed byte for byte.\n\n"
      "Keys of --json: count, tokens, pieces (as tokenizer.json spells them); with --decode: text.",
      "clusterfusion tokenize models/demo -p \"It was a dark night\" --pieces");
  add_model_options(command, settings->model,
                    "checkpoint folder in Hugging Face layout, a tokenizer.json");
  add_text_options(command, settings->source, "--text", "--file");
  add_report_options(command, settings->report);
  command.add_flag("--count", settings->count, "print only the number of tokens")
      ->excludes("--json");
  command.add_flag("--pieces", settings->pieces, "print a line for each token: id and text")
      ->excludes("--json")
      ->excludes("--count");
  command.add_flag("--decode", settings->decode, "read token ids and print text")
      ->excludes("--count")
      ->excludes("--pieces");
  command.add_flag("--no-special-tokens", settings->no_special_tokens,
                   "do not add the tokenizer's special tokens");
  command
      .add_flag("--skip-special-tokens", settings->skip_special_tokens,
                "with --decode: leave special tokens out")
      ->needs("--decode");
}

}  // namespace clusterfusion::cli
