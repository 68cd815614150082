#include "tokenizer/regex_syntax.hpp"

#include <algorithm>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"
#include "tokenizer/unicode_categories.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxPatternBytes = 16384;
constexpr int kMaxClassDepth = 16;
constexpr std::uint32_t kMaxRepeats = 65535;  // PCRE2's

bool is_ascii_letter(char32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char32_t c) { return c >= '0' && c <= '9'; }

CodePointSet one(char32_t c) { return CodePointSet({{c, c}}); }

// \w within classes. Outside of them Oniguruma has a table of its own for Latin-1, by which its
// superscripts and fractions are words too.
CodePointSet word_in_class() {
  const CodePointSet numbers({{0xB2, 0xB3}, {0xB9, 0xB9}, {0xBC, 0xBE}});
  return code_points_with(CodePointProperty::regex_word) & numbers.complement();
}

// What Oniguruma takes for the same letter where case does not count: ASCII letters alone come
// here.
CodePointSet both_cases(char32_t letter) {
  const char32_t lower = letter | 0x20, upper = lower - 0x20;
  CodePointSet set({{lower, lower}, {upper, upper}});
  if (lower == 'k') set = set | one(0x212A);  // the Kelvin sign
  if (lower == 's') set = set | one(0x017F);  // the long s
  return set;
}

// Two letters that some other single character stands for where case does not count (ß, ligatures).
bool folds_together(char32_t first, char32_t second) {
  return (first == 's' && (second == 's' || second == 't')) ||
         (first == 'f' && (second == 'f' || second == 'i' || second == 'l'));
}

class RegexReader {
 public:
  RegexReader(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  RegexSyntax read() {
    if (pattern_.size() > kMaxPatternBytes) {
      fail(ErrorKind::unsupported, "{} has {} bytes, which is not supported; supported: up to {}",
           where_, pattern_.size(), kMaxPatternBytes);
    }
    while (!at_end()) read_element();
    if (groups_.size() > 1) refuse("a group that is not closed");
    return std::move(syntax_);
  }

 private:
  struct Group {
    bool ignores_case = false;
    bool is_look = false;  // looks ahead or behind: nothing to repeat
    // What may match nothing: an alternative that is over, the current one up to its last element,
    // and that element.
    bool may_be_empty = false, is_empty_before = true, is_empty_last = true;

    void add_element(bool is_empty) {
      is_empty_before = is_empty_before && is_empty_last;
      is_empty_last = is_empty;
    }
    void end_alternative() {
      may_be_empty = may_be_empty || (is_empty_before && is_empty_last);
      is_empty_before = is_empty_last = true;
    }
  };

  [[noreturn]] void refuse(std::string_view what) const {
    fail(ErrorKind::unsupported,
         "{} is {}, which is not supported: at byte {} there is {}; supported: what Oniguruma and "
         "PCRE2 have in common, without captures by name or number",
         where_, quote(pattern_), position_, what);
  }

  // --- characters of the pattern ---

  bool at_end() const { return position_ == pattern_.size(); }
  bool next_is(std::string_view text) const { return pattern_.substr(position_).starts_with(text); }
  bool take(std::string_view text) {
    if (!next_is(text)) return false;
    position_ += text.size();
    return true;
  }
  char32_t next(std::string_view expected) {
    if (at_end()) refuse(std::string("its end instead of ").append(expected));
    std::size_t length = 0;
    const char32_t c = decode_valid(pattern_.data() + position_, length);
    position_ += length;
    return c;
  }

  // --- elements ---

  void add_shape(std::string shape) {
    syntax_.elements.push_back({std::move(shape), std::nullopt});
    last_letter_ = 0;
  }

  void add_set(const CodePointSet& set) {
    auto found = std::ranges::find(syntax_.sets, set);
    if (found == syntax_.sets.end()) found = syntax_.sets.insert(found, set);
    const auto index = static_cast<std::size_t>(found - syntax_.sets.begin());
    syntax_.elements.push_back({"", index});
    groups_.back().add_element(false);
    is_repeatable_ = true;
    is_start_ = false;
  }

  // A character, or a class of several.
  void add_characters(const CodePointSet& set) {
    const char32_t letter = single_letter(set);
    if (groups_.back().ignores_case) {
      if (folds_together(last_letter_, letter)) {
        refuse("letters that one character can stand for where case does not count");
      }
      add_set(without_case(set));
    } else {
      add_set(set);
    }
    last_letter_ = letter;
  }

  static char32_t single_letter(const CodePointSet& set) {
    const auto& ranges = set.ranges();
    const bool is_one = ranges.size() == 1 && ranges[0].first == ranges[0].last;
    return is_one && is_ascii_letter(ranges[0].first) ? ranges[0].first | 0x20 : 0;
  }

  CodePointSet without_case(const CodePointSet& set) const {
    CodePointSet folded = set;
    for (const CodePointSet::Range& range : set.ranges()) {
      if (range.last > 0x7F) refuse("a character beyond ASCII where case does not count");
      for (char32_t c = range.first; c <= range.last; ++c) {
        if (is_ascii_letter(c)) folded = folded | both_cases(c);
      }
    }
    return folded;
  }

  void read_element() {
    const char32_t c = next("an element");
    switch (c) {
      case '(': return open_group();
      case ')': return close_group();
      case '|':
        add_shape("|");
        groups_.back().end_alternative();
        is_repeatable_ = false;
        is_start_ = true;
        return;
      case '*':
      case '+':
      case '?':
      case '{': return read_quantifier(c);
      case '.': return add_characters(one('\n').complement());
      case '[': return add_characters(read_class(0));
      case '^': return add_anchor({"(?:\\A|(?<=", ")(?!\\z))"}, one('\n'));
      case '$': return add_anchor({"(?=", "|\\z)"}, one('\n'));
      case '\\': return read_escape();
      default: return add_characters(one(c));
    }
  }

  // Shapes with the same set between each two.
  void add_anchor(const std::vector<std::string>& shapes, const CodePointSet& set) {
    const Group before = groups_.back();
    for (const std::string& shape : shapes) {
      if (&shape != &shapes.front()) add_set(set);
      add_shape(shape);
    }
    groups_.back() = before;
    groups_.back().add_element(true);
    is_repeatable_ = false;
    is_start_ = false;
  }

  void open_group() {
    Group group{groups_.back().ignores_case, false};
    std::string shape = "(?:";
    if (take("?")) {
      if (next_is(">")) refuse("an atomic group, in which Oniguruma goes ways of its own");
      if (take("<=") || take("<!") || take("=") || take("!")) {
        const bool looks_behind = pattern_[position_ - 2] == '<';
        group.is_look = true;
        shape = std::string("(?") + (looks_behind ? "<" : "") + pattern_[position_ - 1];
      } else if (take("i:") || take("-i:")) {
        group.ignores_case = pattern_[position_ - 3] != '-';
      } else if (is_start_ && (take("i)") || take("-i)"))) {
        groups_.back().ignores_case = pattern_[position_ - 3] != '-';
        return;
      } else if (!take(":")) {
        refuse("a group of a kind that is not known here");
      }
    }
    add_shape(shape);
    groups_.push_back(group);
    is_repeatable_ = false;
    is_start_ = true;
  }

  void close_group() {
    if (groups_.size() == 1) refuse("a \")\" without its \"(\"");
    add_shape(")");
    Group group = groups_.back();
    group.end_alternative();
    groups_.pop_back();
    groups_.back().add_element(group.is_look || group.may_be_empty);
    is_repeatable_ = !group.is_look;
    is_start_ = false;
  }

  // In Oniguruma {n}? and {n}+ are two quantifiers, one of the other.
  void read_quantifier(char32_t c) {
    if (!is_repeatable_) refuse("a quantifier with nothing to repeat");
    if (c != '?' && groups_.back().is_empty_last) {
      refuse("a quantifier of a group that may match nothing");
    }
    std::string shape(1, static_cast<char>(c));
    bool is_interval = false, is_exact = false, is_optional = c != '+';
    if (c == '{') {
      is_interval = true;
      const std::uint32_t least = read_count();
      shape += std::to_string(least);
      is_optional = least == 0;
      is_exact = !take(",");
      if (!is_exact) {
        shape += ',';
        if (!next_is("}")) {
          const std::uint32_t most = read_count();
          if (most < least) refuse("an interval whose end is less than its beginning");
          shape += std::to_string(most);
        }
      }
      if (!take("}")) refuse("an interval that is not {n}, {n,} or {n,m}");
      shape += '}';
    }
    if ((is_exact && next_is("?")) || (is_interval && next_is("+"))) {
      refuse("an interval with a quantifier of its own");
    }
    if (take("?")) shape += '?';
    if (!shape.ends_with('?') || shape.size() == 1) {
      if (take("+")) shape += '+';
    }
    if (is_optional) groups_.back().is_empty_last = true;
    add_shape(shape);
    is_repeatable_ = false;
  }

  std::uint32_t read_count() {
    std::uint32_t count = 0;
    const std::size_t begin = position_;
    while (!at_end() && is_digit(static_cast<unsigned char>(pattern_[position_]))) {
      count = 10 * count + static_cast<std::uint32_t>(pattern_[position_++] - '0');
      if (count > kMaxRepeats) refuse("a count of more than 65535");
    }
    if (position_ == begin) refuse("an interval that is not {n}, {n,} or {n,m}");
    return count;
  }

  // --- escapes ---

  void read_escape() {
    const CodePointSet& word = code_points_with(CodePointProperty::regex_word);
    if (take("A")) return add_anchor({"\\A"}, {});
    if (take("z")) return add_anchor({"\\z"}, {});
    if (take("Z")) return add_anchor({"(?=", "?\\z)"}, one('\n'));
    if (take("b")) return add_anchor({"(?:(?<=", ")(?!", ")|(?<!", ")(?=", "))"}, word);
    if (take("B")) return add_anchor({"(?:(?<=", ")(?=", ")|(?<!", ")(?!", "))"}, word);
    if (take("w")) return add_characters(word);
    if (take("W")) return add_characters(word.complement());
    add_characters(read_escaped());
  }

  // What a backslash begins, in classes at least: a character or a set.
  CodePointSet read_escaped() {
    const char32_t c = next("an escape");
    switch (c) {
      case 'd': return code_points_of_category("Nd");
      case 'D': return code_points_of_category("Nd").complement();
      case 's': return white_space();
      case 'S': return white_space().complement();
      case 'w': return word_in_class();
      case 'W': return word_in_class().complement();
      case 'p': return read_property();
      case 'P': return read_property().complement();
      case 'r': return one('\r');
      case 'n': return one('\n');
      case 't': return one('\t');
      case 'f': return one('\f');
      case 'v': return one('\v');
      case 'a': return one('\a');
      case 'e': return one(0x1B);
      case 'x': return one(take("{") ? read_hexadecimal(1, 8, "}") : read_byte());
      case 'u': return one(read_hexadecimal(4, 4, ""));
      default: break;
    }
    if (is_ascii_letter(c) || is_digit(c)) refuse("an escape that is not known here");
    return one(c);
  }

  CodePointSet read_property() {
    if (!take("{")) refuse("\\p without {");
    const bool is_negated = take("^");
    const std::size_t end = pattern_.find('}', position_);
    if (end == pattern_.npos) refuse("\\p{ without }");
    const std::string_view name = pattern_.substr(position_, end - position_);
    const CodePointSet set = name.size() > 2 ? CodePointSet() : code_points_of_category(name);
    if (set.ranges().empty()) refuse("\\p{..} of what is no general category (as L or Lu)");
    position_ = end + 1;
    return is_negated ? set.complement() : set;
  }

  // \xHH is a byte of the encoding, and so a character in ASCII alone.
  char32_t read_byte() {
    const char32_t byte = read_hexadecimal(1, 2, "");
    if (byte > 0x7F) refuse("\\x of a byte beyond ASCII");
    return byte;
  }

  char32_t read_hexadecimal(int least, int most, std::string_view end) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    char32_t value = 0;
    int count = 0;
    for (; count < most && !at_end(); ++count) {
      const auto byte = static_cast<unsigned char>(pattern_[position_]);
      const char lower = static_cast<char>(is_ascii_letter(byte) ? byte | 0x20 : byte);
      const std::size_t digit = kDigits.find(lower);
      if (digit == kDigits.npos) break;
      value = 16 * value + static_cast<char32_t>(digit);
      ++position_;
    }
    const bool is_character = value < CodePointSet::kEnd && (value < 0xD800 || value > 0xDFFF);
    if (count < least || !take(end) || !is_character) refuse("no character in hexadecimal digits");
    return value;
  }

  // --- classes ---

  // What follows "[", up to its "]".
  CodePointSet read_class(int depth) {
    if (depth == kMaxClassDepth) refuse("a class within more classes than are supported");
    const bool is_negated = take("^");
    if (next_is("]")) refuse("a class that begins with \"]\"");
    std::optional<CodePointSet> left;  // of "&&"
    CodePointSet set;
    bool is_first = true;
    while (!take("]")) {
      if (take("&&")) {
        left = left ? *left & set : set;
        set = CodePointSet();
        is_first = true;
        continue;
      }
      set = set | read_class_item(is_first, depth);
      is_first = false;
    }
    if (left) set = *left & set;
    return is_negated ? set.complement() : set;
  }

  // One character, range, escape or nested class.
  CodePointSet read_class_item(bool is_first, int depth) {
    if (take("[")) {
      if (next_is(":")) refuse("a POSIX bracket");
      return read_class(depth + 1);
    }
    if (next_is("-") && !is_first && !next_is("-]")) refuse("a \"-\" that is no range");
    const CodePointSet from = read_class_character();
    if (!next_is("-") || next_is("-]")) return from;
    take("-");
    if (next_is("[") || next_is("&&")) refuse("a range without an end");
    const CodePointSet to = read_class_character();
    const auto is_one = [](const CodePointSet& set) {
      return set.ranges().size() == 1 && set.ranges()[0].first == set.ranges()[0].last;
    };
    if (!is_one(from) || !is_one(to)) refuse("a range between what are no characters");
    const char32_t first = from.ranges()[0].first, last = to.ranges()[0].first;
    if (first > last) refuse("a range whose end comes before its beginning");
    return CodePointSet({{first, last}});
  }

  CodePointSet read_class_character() {
    const char32_t c = next("the rest of a class");
    return c == '\\' ? read_escaped() : one(c);
  }

  const std::string_view pattern_;
  const std::string& where_;
  std::size_t position_ = 0;
  RegexSyntax syntax_;
  std::vector<Group> groups_{1};
  bool is_repeatable_ = false;  // a quantifier may follow
  bool is_start_ = true;        // of an alternative
  char32_t last_letter_ = 0;    // if the last element is one
};

}  // namespace

RegexSyntax read_regex(std::string_view pattern, const std::string& where) {
  return RegexReader(pattern, where).read();
}

}  // namespace clusterfusion
