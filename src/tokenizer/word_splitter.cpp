#include "tokenizer/word_splitter.hpp"

#include "tokenizer/utf8.hpp"

namespace clusterfusion {

// The length of 's, 't, 're, 've, 'm, 'll or 'd at `position`, or 0.
std::size_t WordSplitter::contraction_length(std::size_t position) const noexcept {
  const std::string_view rest = text_.substr(position, 3);
  if (rest.size() < 2 || rest[0] != '\'') return 0;
  switch (rest[1]) {
    case 's':
    case 't':
    case 'm':
    case 'd': return 2;
    case 'r':
    case 'v': return rest.size() == 3 && rest[2] == 'e' ? 3 : 0;
    case 'l': return rest.size() == 3 && rest[2] == 'l' ? 3 : 0;
    default: return 0;
  }
}

inline CharClass WordSplitter::class_at(std::size_t position, std::size_t& length) const noexcept {
  return properties_.char_class(decode_valid(text_.data() + position, length));
}

inline std::size_t WordSplitter::end_of_run(std::size_t position,
                                            CharClass char_class) const noexcept {
  std::size_t length = 0;
  while (position < text_.size() && class_at(position, length) == char_class) position += length;
  return position;
}

// Where the white space that begins at `position` ends as a word: its last character goes to the
// word that follows, unless it is all there is.
std::size_t WordSplitter::end_of_spaces(std::size_t position) const noexcept {
  std::size_t last = position;
  std::size_t length = 0;
  std::size_t end = position;
  while (end < text_.size() && class_at(end, length) == CharClass::space) {
    last = end;
    end += length;
  }
  return end == text_.size() || last == position ? end : last;
}

std::string_view WordSplitter::next() noexcept {
  if (position_ == text_.size()) return {};
  const std::size_t begin = position_;
  std::size_t length = 0;
  CharClass char_class = class_at(begin, length);
  if (text_[begin] == '\'') {
    if (const std::size_t contraction = contraction_length(begin)) {
      position_ = begin + contraction;
      return text_.substr(begin, contraction);
    }
  }
  std::size_t run = begin;
  if (text_[begin] == ' ' && begin + 1 < text_.size()) {
    run = begin + 1;
    char_class = class_at(run, length);
  }
  position_ =
      char_class == CharClass::space ? end_of_spaces(begin) : end_of_run(run + length, char_class);
  return text_.substr(begin, position_ - begin);
}

}  // namespace clusterfusion
