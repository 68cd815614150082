#include "cli/option_names.hpp"

#include <cctype>
#include <string_view>

namespace clusterfusion::cli {
namespace {

struct Name {
  std::string_view field;
  std::string_view option;
};

// Words that mean nothing else.
constexpr Name kFields[] = {
    {"prompt_tokens", "--prompt-tokens"},
    {"stop_tokens", "--stop-tokens"},
    {"stop_strings", "--stop"},
    {"max_new_tokens", "--max-new-tokens"},
    {"max_positions", "--context"},
    {"top_k", "--top-k"},
    {"top_p", "--top-p"},
    {"min_p", "--min-p"},
    {"repetition_penalty", "--repetition-penalty"},
    {"num_logprobs", "--logprobs"},
    {"min_new_tokens", "--min-new-tokens"},
    {"frequency_penalty", "--frequency-penalty"},
    {"presence_penalty", "--presence-penalty"},
    {"no_repeat_ngram_size", "--no-repeat-ngram-size"},
    {"logit_bias", "--logit-bias"},
    {"allow_padded_ids", "--allow-padded-ids"},
    {"kv_dtype", "--kv-dtype"},
    {"kv_bytes", "--kv-bytes"},
    {"max_sequences", "--max-sequences"},
    {"draft_tokens", "--draft-tokens"},
};
// Words of English too: fields where a message begins with them.
constexpr Name kFirstWords[] = {{"temperature", "--temperature"},
                                {"threads", "--threads"},
                                {"context", "--context"},
                                {"stride", "--stride"}};

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

bool stands_alone(std::string_view text, std::size_t at, std::size_t size) {
  const bool begins = at == 0 || text[at - 1] == ' ' || text[at - 1] == '(';
  const bool ends =
      at + size == text.size() || (!is_word(text[at + size]) && text[at + size] != '/');
  return begins && ends;
}

}  // namespace

std::string with_option_names(const std::string& message) {
  std::string result = message;
  for (const Name& name : kFirstWords) {
    if (result.starts_with(name.field) && stands_alone(result, 0, name.field.size())) {
      result.replace(0, name.field.size(), name.option);
    }
  }
  for (const Name& name : kFields) {
    for (std::size_t at = result.find(name.field); at != std::string::npos;
         at = result.find(name.field, at + 1)) {
      if (!stands_alone(result, at, name.field.size())) continue;
      result.replace(at, name.field.size(), name.option);
    }
  }
  return result;
}

}  // namespace clusterfusion::cli
