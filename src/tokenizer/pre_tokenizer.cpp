#include "tokenizer/pre_tokenizer.hpp"

#include <algorithm>

#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// Each character of the set is a match of its own.
std::vector<TextPart> find_characters(const CodePointSet& set, std::string_view text) {
  std::vector<TextPart> parts;
  std::size_t length = 0;
  for (std::size_t at = 0; at < text.size(); at += length) {
    const bool is_match = set.contains(decode_valid(text.data() + at, length));
    if (is_match || parts.empty() || parts.back().is_match) {
      parts.push_back({at, at + length, is_match});
    } else {
      parts.back().end = at + length;
    }
  }
  return parts;
}

// Joins each part to the one before it where `joins` says so of the two.
template <typename Joins>
std::vector<TextPart> joined(const std::vector<TextPart>& parts, const Joins& joins) {
  std::vector<TextPart> result;
  const TextPart* previous = nullptr;
  for (const TextPart& part : parts) {
    if (previous && joins(*previous, part)) {
      result.back().end = part.end;
    } else {
      result.push_back(part);
    }
    previous = &part;
  }
  return result;
}

}  // namespace

std::vector<std::string_view> Split::pieces(std::string_view text) const {
  const auto* characters = std::get_if<CodePointSet>(&delimiter);
  std::vector<TextPart> parts =
      characters ? find_characters(*characters, text) : std::get<Pattern>(delimiter).find_all(text);
  for (TextPart& part : parts) part.is_match ^= invert;
  switch (behavior) {
    case SplitBehavior::isolated: break;
    case SplitBehavior::removed: std::erase_if(parts, &TextPart::is_match); break;
    case SplitBehavior::contiguous:
      parts = joined(parts, [](const TextPart& left, const TextPart& right) {
        return left.is_match == right.is_match;
      });
      break;
    case SplitBehavior::merged_with_previous:
      parts = joined(parts, [](const TextPart& left, const TextPart& right) {
        return right.is_match && !left.is_match;
      });
      break;
    case SplitBehavior::merged_with_next:
      parts = joined(parts, [](const TextPart& left, const TextPart& right) {
        return left.is_match && !right.is_match;
      });
      break;
  }
  std::vector<std::string_view> result;
  result.reserve(parts.size());
  for (const TextPart& part : parts) {
    if (part.begin < part.end) result.push_back(text.substr(part.begin, part.end - part.begin));
  }
  return result;
}

std::string PreTokenizer::spell(const Metaspace& step, std::string_view text, bool is_first) {
  std::string spelled = Pattern{" ", nullptr}.replaced(text, step.replacement);
  const bool has_prefix = step.prefix == Metaspace::Prefix::always ||
                          (step.prefix == Metaspace::Prefix::first && is_first);
  if (has_prefix && !spelled.starts_with(step.replacement)) spelled.insert(0, step.replacement);
  return spelled;
}

std::vector<std::string_view> PreTokenizer::cut(const Metaspace& step, std::string_view text) {
  if (!step.split) return {text};
  return Split{Pattern{step.replacement, nullptr}, SplitBehavior::merged_with_next, false}.pieces(
      text);
}

}  // namespace clusterfusion
