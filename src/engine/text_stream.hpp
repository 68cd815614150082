// Tokens of one sequence to text that may be shown, and where it ends.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/tokenizer.hpp"

namespace clusterfusion {

// Ends a text before the leftmost stop string in it. What may still turn out to be (the beginning
// of) that stop string is held back, so the outcome does not depend on how the text was cut into
// pieces. Stop strings are looked for both in the text that is shown and in the text with the
// pieces that are not: special tokens.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stop_strings)
      : stop_strings_(std::move(stop_strings)) {}

  // Adds text; returns what is now known to stand before every stop string.
  std::string push(const std::string& piece);
  // Adds text that counts for stop strings but is never returned. Returns the same.
  std::string push_hidden(std::string_view piece);
  // The text has ended: returns what was held back, up to a stop string.
  std::string finish();
  // A stop string was found: no more text comes.
  bool stopped() const noexcept { return stopped_; }

 private:
  // Places in the held text; its size for nowhere.
  struct Found {
    std::size_t whole;      // where the leftmost whole stop string begins
    std::size_t beginning;  // or one that the text's end may have cut off
  };
  std::string decide();
  Found find() const;
  Found find_in(std::string_view text) const;
  std::string release(std::size_t count);

  std::vector<std::string> stop_strings_;
  std::string held_;
  std::vector<bool> hidden_;  // for each byte of the held text
  bool stopped_ = false;
};

// Text of the new tokens alone, as well-formed UTF-8. A token beyond the tokenizer's vocabulary
// (the model's may be padded) and every token where there is no tokenizer adds no text.
class TextStream {
 public:
  // prompt: what stands before the first of them.
  TextStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens,
             std::vector<std::string> stop_strings, std::span<const TokenId> prompt = {});

  // The text that `token` makes certain; may be empty.
  std::string push(TokenId token);
  // What was held back. Nothing may be pushed afterwards.
  std::string finish();
  // The text has ended before a stop string.
  bool stopped() const noexcept { return stop_filter_.stopped(); }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_tokens_;
  std::optional<StreamDecoder> decoder_;
  StopFilter stop_filter_;
};

}  // namespace clusterfusion
