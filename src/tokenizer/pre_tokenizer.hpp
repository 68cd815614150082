// What the "pre_tokenizer" of tokenizer.json does: cutting text into words.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "tokenizer/code_point_set.hpp"
#include "tokenizer/normalizer.hpp"
#include "tokenizer/word_splitter.hpp"

namespace clusterfusion {

// What becomes of a match between the pieces that a Split gives.
enum class SplitBehavior { isolated, removed, contiguous, merged_with_previous, merged_with_next };

// What a Split looks for: a pattern, or single characters out of a set.
using Delimiter = std::variant<Pattern, CodePointSet>;

struct Split {
  Delimiter delimiter;
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;  // matches are what is between, and the other way around

  // Pieces of `text`, in order; none is empty.
  std::vector<std::string_view> pieces(std::string_view text) const;
  // The expression whose parts are the pieces, as they are; null if there is more to do.
  const Regex* pieces_of() const noexcept {
    const auto* pattern = std::get_if<Pattern>(&delimiter);
    return pattern && behavior == SplitBehavior::isolated ? pattern->regex.get() : nullptr;
  }
};

// Spaces are spelled as `replacement`.
struct Metaspace {
  enum class Prefix { always, first, never };  // whether one is put before the text
  std::string replacement;
  Prefix prefix = Prefix::always;
  bool split = true;  // before each replacement
};

// Bytes are spelled in the byte-level alphabet; that is left to the vocabulary here.
struct ByteLevel {
  bool add_prefix_space = false;
  bool split_words = true;  // by GPT-2's regex
};

using PreTokenizerStep = std::variant<Split, Metaspace, ByteLevel>;

class PreTokenizer {
 public:
  PreTokenizer() = default;
  // ByteLevel, if it is among them, is the last.
  explicit PreTokenizer(std::vector<PreTokenizerStep> steps) : steps_(std::move(steps)) {}

  const std::vector<PreTokenizerStep>& steps() const noexcept { return steps_; }
  bool is_byte_level() const noexcept {
    return !steps_.empty() && std::holds_alternative<ByteLevel>(steps_.back());
  }

  // Calls on_word(std::string_view) for each word of a piece of text that is not empty.
  // `is_first`: the piece is the beginning of what was given to encode.
  template <typename OnWord>
  void split(std::string_view piece, bool is_first, OnWord&& on_word) const {
    run(0, piece, is_first, on_word);
  }

 private:
  template <typename OnWord>
  void run(std::size_t step, std::string_view text, bool is_first, OnWord& on_word) const {
    if (step == steps_.size()) {
      on_word(text);
    } else if (const auto* byte_level = std::get_if<ByteLevel>(&steps_[step])) {
      run_byte_level(*byte_level, text, on_word);
    } else if (const auto* metaspace = std::get_if<Metaspace>(&steps_[step])) {
      const std::string spelled = spell(*metaspace, text, is_first);
      run_pieces(step, cut(*metaspace, spelled), is_first, on_word);
    } else if (const Regex* regex = std::get<Split>(steps_[step]).pieces_of()) {
      regex->for_each_part(text, [&](const TextPart& part) {
        if (part.begin == part.end) return;
        run(step + 1, text.substr(part.begin, part.end - part.begin), is_first && part.begin == 0,
            on_word);
      });
    } else {
      const auto pieces = std::get<Split>(steps_[step]).pieces(text);
      run_pieces(step, pieces, is_first && !pieces.empty() && pieces[0].data() == text.data(),
                 on_word);
    }
  }

  template <typename OnWord>
  void run_pieces(std::size_t step, const std::vector<std::string_view>& pieces, bool is_first,
                  OnWord& on_word) const {
    for (const std::string_view piece : pieces) {
      run(step + 1, piece, is_first, on_word);
      is_first = false;
    }
  }

  template <typename OnWord>
  static void run_byte_level(const ByteLevel& step, std::string_view text, OnWord& on_word) {
    std::string prefixed;
    if (step.add_prefix_space && text[0] != ' ') {
      text = prefixed.append(1, ' ').append(text);
    }
    if (!step.split_words) return on_word(text);
    WordSplitter words(text);
    for (std::string_view word = words.next(); !word.empty(); word = words.next()) on_word(word);
  }

  static std::string spell(const Metaspace& step, std::string_view text, bool is_first);
  static std::vector<std::string_view> cut(const Metaspace& step, std::string_view text);

  std::vector<PreTokenizerStep> steps_;
};

}  // namespace clusterfusion
