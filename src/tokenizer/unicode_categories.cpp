#include "tokenizer/unicode_categories.hpp"

#include <array>
#include <utility>
#include <vector>

namespace clusterfusion {
namespace {

struct CategoryRange {
  char32_t first, last;
  std::uint8_t bits;
};

constexpr CategoryRange kCategoryRanges[] = {
#include "tokenizer/unicode_categories.inc"
};

constexpr std::uint8_t kCategoryMask = 31;
constexpr std::uint8_t kRegexWord = 32, kNumeric = 64, kPunctuation = 128;
// In the order of their numbers in the table, where what is not listed is Cn.
constexpr std::array<std::string_view, 29> kCategories = {
    "Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};

template <typename Condition>
CodePointSet ranges_where(const Condition& condition) {
  std::vector<CodePointSet::Range> ranges;
  for (const CategoryRange& range : kCategoryRanges) {
    if (condition(range.bits)) ranges.push_back({range.first, range.last});
  }
  return CodePointSet(std::move(ranges));
}

CodePointSet with_bit(std::uint8_t bit) {
  return ranges_where([bit](std::uint8_t bits) { return (bits & bit) != 0; });
}

}  // namespace

CodePointSet code_points_of_category(std::string_view name) {
  const auto is_named = [name](std::uint8_t bits) {
    return kCategories[bits & kCategoryMask].starts_with(name);
  };
  if (name.empty()) return {};
  CodePointSet found = ranges_where(is_named);
  if (!kCategories[0].starts_with(name)) return found;
  const CodePointSet assigned =
      ranges_where([](std::uint8_t bits) { return (bits & kCategoryMask) != 0; });
  return found | assigned.complement();
}

const CodePointSet& code_points_with(CodePointProperty property) {
  static const CodePointSet word = with_bit(kRegexWord);
  static const CodePointSet numeric = with_bit(kNumeric);
  static const CodePointSet punctuation = with_bit(kPunctuation);
  switch (property) {
    case CodePointProperty::regex_word: return word;
    case CodePointProperty::numeric: return numeric;
    case CodePointProperty::punctuation: break;
  }
  return punctuation;
}

const CodePointSet& white_space() {
  static const CodePointSet set =
      code_points_of_category("Z") | CodePointSet({{0x09, 0x0D}, {0x85, 0x85}});
  return set;
}

}  // namespace clusterfusion
