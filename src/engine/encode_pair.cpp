// Engine::encode_pair: two texts as one sequence of tokens, divided where the second begins.
#include "base/fail.hpp"
#include "clusterfusion/engine.hpp"
#include "tokenizer/unicode_properties.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// As Python's str.isspace(): Unicode's white space and the four separators of ASCII.
bool is_python_space(char32_t c) {
  return (c >= 0x1C && c <= 0x1F) || UnicodeProperties::get().is_space(c);
}

// How many bytes of `text` come before the white space at its end.
std::size_t length_without_trailing_space(std::string_view text) {
  std::size_t length = 0;
  for (std::size_t at = 0; at < text.size();) {
    const Utf8Step step = next_utf8(text.substr(at));
    at += step.length;
    if (step.status != Utf8Status::complete || !is_python_space(step.code_point)) length = at;
  }
  return length;
}

TokenId first_token(const ModelConfig& config) {
  if (config.bos_token) return *config.bos_token;
  require(!config.eos_tokens.empty(), ErrorKind::invalid_argument,
          "an empty context stands for bos_token_id or eos_token_id, and config.json has neither; "
          "give a context");
  return config.eos_tokens.front();
}

}  // namespace

LoglikelihoodRequest Engine::encode_pair(std::string_view context,
                                         std::string_view continuation) const {
  LoglikelihoodRequest pair;
  if (context.empty()) {
    pair.continuation = tokenizer().encode(continuation, false);
    pair.context = {first_token(model().config())};
    if (!pair.continuation.empty() && pair.continuation.front() == pair.context.front()) {
      pair.continuation.erase(pair.continuation.begin());
    }
  } else {
    const std::size_t length = length_without_trailing_space(context);
    const std::string whole = std::string(context) + std::string(continuation);
    const std::vector<TokenId> tokens = tokenizer().encode(whole);
    pair.context = tokenizer().encode(context.substr(0, length));
    if (tokens.size() > pair.context.size()) {
      pair.continuation.assign(tokens.begin() + std::ssize(pair.context), tokens.end());
    }
  }
  require(!pair.context.empty(), ErrorKind::invalid_argument,
          "the context has no token besides white space; give some text, or \"\"");
  require(!pair.continuation.empty(), ErrorKind::invalid_argument,
          "the continuation has no token of its own: it is empty or is part of the context's last "
          "token");
  return pair;
}

}  // namespace clusterfusion
