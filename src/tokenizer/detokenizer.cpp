#include "tokenizer/detokenizer.hpp"

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// What ends at most `count` times with `content`, without that.
std::string_view without_end(std::string_view text, std::string_view content, std::size_t count) {
  for (; count > 0 && text.ends_with(content); --count) text.remove_suffix(content.size());
  return text;
}

std::string apply(const Replace& step, std::string_view token, bool) {
  return step.pattern.replaced(token, step.content);
}

std::string apply(const DecoderSpec::MetaspaceStep& step, std::string_view token, bool is_first) {
  const char* content = is_first && step.drops_first ? "" : " ";
  return Pattern{step.replacement, nullptr}.replaced(token, content);
}

std::string apply(const DecoderSpec::StripStep& step, std::string_view token, bool) {
  for (std::size_t i = 0; i < step.start && token.starts_with(step.content); ++i) {
    token.remove_prefix(step.content.size());
  }
  return std::string(without_end(token, step.content, step.stop));
}

std::string apply_steps(const DecoderSpec& spec, std::string token, bool is_first) {
  for (const DecoderSpec::TokenStep& step : spec.token_steps) {
    token = std::visit([&](const auto& one) { return apply(one, token, is_first); }, step);
  }
  return token;
}

// The byte that "<0x41>" stands for. Rust, which reads the digits, takes a "+" for one of two.
std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return std::nullopt;
  const char* begin = token.data() + (token[3] == '+' ? 4 : 3);
  const char* end = token.data() + 5;
  unsigned value = 0;
  const auto [stop, error] = std::from_chars(begin, end, value, 16);
  if (error != std::errc() || stop != end) return std::nullopt;
  return static_cast<char>(value);
}

bool drops_first(const DecoderSpec& spec) {
  return std::ranges::any_of(spec.token_steps, [](const DecoderSpec::TokenStep& step) {
    const auto* metaspace = std::get_if<DecoderSpec::MetaspaceStep>(&step);
    return metaspace && metaspace->drops_first;
  });
}

}  // namespace

Detokenizer::Detokenizer(const DecoderSpec& spec, std::vector<std::string> bytes)
    : is_byte_level_(spec.is_byte_level),
      text_edges_(spec.text_edges),
      bytes_(std::move(bytes)),
      is_byte_(bytes_.size()) {
  if (is_byte_level_) return;
  if (drops_first(spec)) {
    for (const std::string& token : bytes_) first_bytes_.push_back(apply_steps(spec, token, true));
  }
  for (std::size_t id = 0; id < bytes_.size(); ++id) {
    bytes_[id] = apply_steps(spec, std::move(bytes_[id]), false);
    const auto byte = spec.byte_fallback ? fallback_byte(bytes_[id]) : std::nullopt;
    if (!byte) continue;
    is_byte_[id] = true;
    bytes_[id] = *byte;
  }
}

std::string Detokenizer::push(State& state, TokenId token) const {
  return stripped(state, push_piece(state, token));
}

// As tokenizers has it, one broken byte makes U+FFFD of each byte of its run: so a run is held back
// until it ends.
std::string Detokenizer::push_piece(State& state, TokenId token) const {
  const bool is_first = std::exchange(state.is_first, false);
  std::string text;
  if (is_byte_level_) {
    state.held += bytes_[token];
    state.held.erase(0, append_repaired(state.held, false, text));
    return text;
  }
  if (is_byte_[token]) {
    state.held += bytes_[token];
    return {};
  }
  const std::string run = std::exchange(state.held, {});
  if (is_valid_utf8(run)) {
    text = run;
  } else {
    for (std::size_t i = 0; i < run.size(); ++i) text += kReplacementCharacter;
  }
  return text + (is_first && !first_bytes_.empty() ? first_bytes_[token] : bytes_[token]);
}

std::string Detokenizer::finish(State& state) const {
  const std::string held = std::exchange(state.held, {});
  std::string text;
  if (is_byte_level_ || is_valid_utf8(held)) {
    append_repaired(held, true, text);
  } else {
    for (std::size_t i = 0; i < held.size(); ++i) text += kReplacementCharacter;
  }
  text = stripped(state, std::move(text));
  const std::string edge = std::exchange(state.edge, {});
  const std::string_view kept = without_end(edge, text_edges_.content, text_edges_.stop);
  return text.append(kept);
}

std::string Detokenizer::stripped(State& state, std::string text) const {
  const std::string& content = text_edges_.content;
  if (state.is_beginning && text_edges_.start > 0) {
    std::size_t begin = 0;
    while (state.num_stripped < text_edges_.start &&
           std::string_view(text).substr(begin).starts_with(content)) {
      begin += content.size();
      ++state.num_stripped;
    }
    text.erase(0, begin);
    state.is_beginning = text.empty() && state.num_stripped < text_edges_.start;
  }
  if (text_edges_.stop == 0) return text;
  text.insert(0, std::exchange(state.edge, {}));
  const std::size_t kept = without_end(text, content, text_edges_.stop).size();
  state.edge = text.substr(kept);
  text.erase(kept);
  return text;
}

}  // namespace clusterfusion
