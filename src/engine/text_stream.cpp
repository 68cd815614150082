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
  std::size_t match = held_.size();
  std::size_t beginning = held_.size();
  for (const std::string& stop : stop_strings_) {
    match = std::min(match, held_.find(stop));
    beginning = std::min(beginning, first_beginning(held_, stop));
  }
  // A stop string that is whole decides only if none that begins before it may still be completed.
  stopped_ = match < held_.size() && match == beginning;
  return release(beginning);
}

std::string StopFilter::finish() {
  if (stopped_) return {};
  std::size_t match = held_.size();
  for (const std::string& stop : stop_strings_) match = std::min(match, held_.find(stop));
  stopped_ = match < held_.size();
  return release(match);
}

std::string StopFilter::release(std::size_t count) {
  std::string released = held_.substr(0, count);
  held_.erase(0, count);
  return released;
}

TextStream::TextStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens,
                       std::vector<std::string> stop_strings)
    : tokenizer_(std::move(tokenizer)), stop_filter_(std::move(stop_strings)) {
  if (tokenizer_) decoder_.emplace(tokenizer_, skip_special_tokens);
}

std::string TextStream::push(TokenId token) {
  if (!decoder_ || token >= tokenizer_->vocab_size()) return {};
  return stop_filter_.push(decoder_->push(token));
}

std::string TextStream::finish() {
  if (!decoder_) return {};
  std::string text = stop_filter_.push(decoder_->finish());
  return text + stop_filter_.finish();
}

}  // namespace clusterfusion
