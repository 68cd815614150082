#include "tokenizer/neighbour_files.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "io/mapped_file.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxNeighbourBytes = 64 << 20;
constexpr std::string_view kSpecialTokens[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                               "pad_token", "cls_token", "mask_token"};
constexpr std::string_view kSpecialTokenLists[] = {"additional_special_tokens",
                                                   "extra_special_tokens"};
constexpr std::string_view kRemedy =
    "let transformers write it there: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)";

class Comparison {
 public:
  explicit Comparison(const TokenizerFile& file) : file_(file) {}

  void tokenizer_config(const JsonValue& root) {
    const JsonObject config(root);
    compare_prefix_space(config);
    compare_edges(config);
    special_tokens_map(root);
    if (const auto tokens = config.find_non_null("added_tokens_decoder")) {
      const JsonObject by_id(*tokens);
      for (const JsonObject::Member& member : by_id.members()) {
        const JsonValue value = by_id.value_of(member);
        check_token(value, content_of(value), std::string(member.first));
      }
    }
  }

  void special_tokens_map(const JsonValue& root) {
    const JsonObject map(root);
    for (const std::string_view key : kSpecialTokens) {
      if (const auto token = map.find_non_null(key)) check_token(*token, content_of(*token), "");
    }
    for (const std::string_view key : kSpecialTokenLists) {
      const auto tokens = map.find_non_null(key);
      if (!tokens) continue;
      if (tokens->is_object()) {  // by name
        const JsonObject by_name(*tokens);
        for (const JsonObject::Member& member : by_name.members()) {
          const JsonValue token = by_name.value_of(member);
          check_token(token, content_of(token), "");
        }
        continue;
      }
      for (const JsonValue& token : tokens->array()) check_token(token, content_of(token), "");
    }
  }

  void added_tokens(const JsonValue& root) {
    const JsonObject ids(root);
    for (const JsonObject::Member& member : ids.members()) {
      const JsonValue id = ids.value_of(member);
      check_token(id, member.first, std::to_string(id.integer()));
    }
  }

  std::vector<std::string> take_warnings() { return std::move(warnings_); }

 private:
  // These take tokenizer.json as it is.
  static bool is_plain_class(const JsonObject& config) {
    const auto name = config.find_non_null("tokenizer_class");
    return name &&
           (name->string() == "PreTrainedTokenizerFast" || name->string() == "TokenizersBackend");
  }

  void compare_prefix_space(const JsonObject& config) {
    const auto value = config.find_non_null("add_prefix_space");
    if (!value || value->boolean() == file_.adds_prefix_space() || is_plain_class(config)) return;
    warnings_.push_back(
        fmt::format("{} is {}, but tokenizer.json says {}, which is what counts here, whereas "
                    "transformers goes "
                    "by the former; {}",
                    value->where(), value->boolean(), file_.adds_prefix_space(), kRemedy));
  }

  void compare_edges(const JsonObject& config) {
    const std::vector<TemplatePiece>& pieces = file_.post_processing;
    const bool adds_first = !pieces.empty() && !pieces.front().is_text;
    const bool adds_last = !pieces.empty() && !pieces.back().is_text;
    compare_edge(config, "add_bos_token", adds_first);
    compare_edge(config, "add_eos_token", adds_last);
  }

  void compare_edge(const JsonObject& config, std::string_view key, bool is_added) {
    const auto value = config.find_non_null(key);
    if (!value || !value->boolean() || is_added) return;
    warnings_.push_back(fmt::format(
        "{} is true, but the \"post_processor\" of tokenizer.json, which is what counts "
        "here, adds no token there (transformers before version 5 does); {}",
        value->where(), kRemedy));
  }

  static std::string content_of(const JsonValue& token) {
    if (token.is_object()) return std::string(JsonObject(token).at("content").string());
    return std::string(token.string());
  }

  // `id`: what it must be; empty for any.
  void check_token(const JsonValue& value, std::string_view content, const std::string& id) {
    const auto found = std::ranges::find(file_.added_tokens, content, &AddedToken::content);
    const bool is_known = found != file_.added_tokens.end();
    if (is_known && (id.empty() || id == std::to_string(found->id))) return;
    const std::string expected = id.empty() ? "" : fmt::format(" with the id {}", id);
    const std::string there =
        is_known ? fmt::format("has the id {}", found->id) : "is text like any other";
    warnings_.push_back(fmt::format(
        "{} asks for the token {}{}, which is not in \"added_tokens\" of tokenizer.json so that it "
        "{} here; {}",
        value.where(), quote(content), expected, there, kRemedy));
  }

  const TokenizerFile& file_;
  std::vector<std::string> warnings_;
};

template <typename Compare>
void read_if_there(const std::filesystem::path& path, std::vector<std::string>& warnings,
                   const Compare& compare) {
  if (!is_there(path)) return;
  try {
    const JsonDocument document(read_file(path, kMaxNeighbourBytes), path.string());
    compare(document.root());
  } catch (const Error& error) {
    warnings.push_back(fmt::format("{}; the file is not used", error.what()));
  }
}

}  // namespace

std::vector<std::string> unmet_settings(const std::filesystem::path& folder,
                                        const TokenizerFile& file) {
  Comparison comparison(file);
  std::vector<std::string> unreadable;
  read_if_there(folder / "tokenizer_config.json", unreadable,
                [&](const JsonValue& root) { comparison.tokenizer_config(root); });
  read_if_there(folder / "special_tokens_map.json", unreadable,
                [&](const JsonValue& root) { comparison.special_tokens_map(root); });
  read_if_there(folder / "added_tokens.json", unreadable,
                [&](const JsonValue& root) { comparison.added_tokens(root); });
  std::vector<std::string> warnings = comparison.take_warnings();
  warnings.insert(warnings.end(), unreadable.begin(), unreadable.end());
  return warnings;
}

std::shared_ptr<const Tokenizer> open_tokenizer_of(const std::filesystem::path& folder) {
  std::error_code error;
  // A file that is there but cannot be reached is for Tokenizer::open to report.
  const auto type = std::filesystem::symlink_status(folder / "tokenizer.json", error).type();
  return type == std::filesystem::file_type::not_found ? nullptr : Tokenizer::open(folder);
}

void fail_no_tokenizer(const std::filesystem::path& folder) {
  std::vector<std::string> others;
  for (const char* name : {"vocab.json", "merges.txt", "spiece.model", "tokenizer.model"}) {
    if (is_there(folder / name)) others.emplace_back(name);
  }
  const std::string found =
      others.empty() ? "" : fmt::format(" (only {})", fmt::join(others, ", "));
  const std::string remedy =
      others.empty() ? "copy it there from the checkpoint's source"
                     : fmt::format(
                           "let transformers write it: python -c \"from transformers import "
                           "AutoTokenizer as T; T.from_pretrained('{0}').save_pretrained("
                           "'{0}')\"",
                           folder.string());
  fail(ErrorKind::not_found,
       "{} has no tokenizer.json{}, and text needs a tokenizer; {}, or work with token ids",
       folder.string(), found, remedy);
}

}  // namespace clusterfusion
