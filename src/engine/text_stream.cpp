#include "engine/text_stream.hpp"

#include <algorithm>
#include <string_view>

namespace clusterfusion {
namespace {

// Where `stop` begins in `text`, whole or cut off by the text's end; text.size() if nowhere.
std::size_t first_beginning(std::string_view text, std::string_view stop) {
  for (std::size_t start = text.find(stop[0]); start < text.size();
       start = text.find(stop[0], start + 1)) {
    const std::size_t length = std::min(stop.size(), text.size() - start);
    if (text.compare(start, length, stop, 0, length) == 0) return start;
  }
  return text.size();
}

}  // namespace

std::string StopFilter::push(const std::string& piece) {
  if (stopped_) return {};
  held_ += piece;
  hidden_.resize(held_.size(), false);
  return decide();
}

std::string StopFilter::push_hidden(std::string_view piece) {
  if (stopped_ || stop_strings_.empty()) return {};
  held_ += piece;
  hidden_.resize(held_.size(), true);
  return decide();
}

std::string StopFilter::decide() {
  const Found found = find();
  // A stop string that is whole decides only if none that begins before it may still be completed.
  stopped_ = found.whole < held_.size() && found.whole == found.beginning;
  return release(found.beginning);
}

std::string StopFilter::finish() {
  if (stopped_) return {};
  const std::size_t whole = find().whole;
  stopped_ = whole < held_.size();
  return release(whole);
}

StopFilter::Found StopFilter::find() const {
  Found found = find_in(held_);
  if (std::ranges::find(hidden_, true) == hidden_.end()) return found;
  std::string shown;
  std::vector<std::size_t> places;  // of the shown bytes
  for (std::size_t at = 0; at < held_.size(); ++at) {
    if (hidden_[at]) continue;
    shown += held_[at];
    places.push_back(at);
  }
  places.push_back(held_.size());
  const Found in_shown = find_in(shown);
  return {std::min(found.whole, places[in_shown.whole]),
          std::min(found.beginning, places[in_shown.beginning])};
}

StopFilter::Found StopFilter::find_in(std::string_view text) const {
  Found found{text.size(), text.size()};
  for (const std::string& stop : stop_strings_) {
    found.whole = std::min(found.whole, text.find(stop));
    found.beginning = std::min(found.beginning, first_beginning(text, stop));
  }
  return found;
}

std::string StopFilter::release(std::size_t count) {
  std::string released;
  for (std::size_t at = 0; at < count; ++at) {
    if (!hidden_[at]) released += held_[at];
  }
  held_.erase(0, count);
  hidden_.erase(hidden_.begin(), hidden_.begin() + static_cast<std::ptrdiff_t>(count));
  return released;
}

TextStream::TextStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens,
                       std::vector<std::string> stop_strings, std::span<const TokenId> prompt)
    : tokenizer_(std::move(tokenizer)),
      skip_special_tokens_(skip_special_tokens),
      stop_filter_(std::move(stop_strings)) {
  if (!tokenizer_) return;
  const bool continues = std::ranges::any_of(prompt, [&](TokenId token) {
    return token < tokenizer_->vocab_size() &&
           !(skip_special_tokens && tokenizer_->is_special(token));
  });
  decoder_.emplace(tokenizer_, skip_special_tokens, continues);
}

std::string TextStream::push(TokenId token) {
  if (!decoder_) return {};
  if (skip_special_tokens_ && tokenizer_->is_special(token)) {
    return stop_filter_.push_hidden(tokenizer_->bytes_of(token));
  }
  return stop_filter_.push(decoder_->push(token));
}

std::string TextStream::finish() {
  if (!decoder_) return {};
  std::string text = stop_filter_.push(decoder_->finish());
  return text + stop_filter_.finish();
}

}  // namespace clusterfusion
