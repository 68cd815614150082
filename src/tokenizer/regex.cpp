#include "tokenizer/regex.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "base/fail.hpp"
#include "tokenizer/regex_syntax.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxSymbols = 256;

// Memory for groups that repeat: it is only taken where it is needed.
constexpr std::size_t kStackBytes = 64 << 10, kStackBytesPerByte = 256, kMaxStackBytes = 64 << 20;
constexpr std::size_t kHeapKib = 64 << 10;

// Steps that one match may take, which grow with the text: a run of white space is tried from its
// beginning to its end. What is more backtracks without end.
constexpr std::size_t kMatchSteps = 1'000'000, kMatchStepsPerByte = 64;

// The time that a text may take: some hundred times what expressions of tokenizers do.
constexpr std::chrono::seconds kTime{2};
constexpr std::chrono::microseconds kTimePerByte{10};

using Symbols = std::vector<std::uint8_t>;

// Which sets the code points of one interval are in, to the symbol that they have.
class SymbolTable {
 public:
  SymbolTable(const std::vector<CodePointSet>& sets, const std::string& where)
      : symbols_(CodePointSet::kEnd), members_(sets.size()) {
    std::vector<char32_t> borders{0, CodePointSet::kEnd};
    for (const CodePointSet& set : sets) {
      for (const CodePointSet::Range& range : set.ranges()) {
        borders.push_back(range.first);
        borders.push_back(range.last + 1);
      }
    }
    std::ranges::sort(borders);
    borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
    std::map<std::vector<bool>, std::uint8_t> known;
    std::vector<bool> is_in(sets.size());
    for (std::size_t i = 0; i + 1 < borders.size(); ++i) {
      for (std::size_t set = 0; set < sets.size(); ++set) {
        is_in[set] = sets[set].contains(borders[i]);
      }
      const auto [entry, is_new] = known.emplace(is_in, static_cast<std::uint8_t>(known.size()));
      require(known.size() <= kMaxSymbols, ErrorKind::unsupported,
              "{} tells apart more than {} kinds of characters, which is not supported", where,
              kMaxSymbols);
      std::fill(symbols_.begin() + borders[i], symbols_.begin() + borders[i + 1], entry->second);
      if (!is_new) continue;
      for (std::size_t set = 0; set < sets.size(); ++set) {
        if (is_in[set]) members_[set].push_back(entry->second);
      }
    }
  }

  // A class of PCRE2 for the symbols of a set.
  std::string class_of(std::size_t set) const {
    if (members_[set].empty()) return "[^\\x00-\\xff]";
    std::string text = "[";
    for (const std::uint8_t symbol : members_[set]) text += fmt::format("\\x{:02x}", symbol);
    return text + "]";
  }

  Symbols take() { return std::move(symbols_); }

 private:
  Symbols symbols_;
  std::vector<Symbols> members_;  // of each set
};

}  // namespace

struct Regex::Compiled {
  Compiled(const std::string& pattern, const std::string& where) {
    // Auto-possession is wrong where a group with "?+" follows (1*(?:23)?+[a1], in PCRE2 10.42).
    constexpr std::uint32_t kOptions =
        PCRE2_NEVER_UTF | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_POSSESS;
    int error = 0;
    PCRE2_SIZE offset = 0;
    code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), kOptions,
                         &error, &offset, nullptr);
    if (!code) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(error, message, sizeof message);
      fail(ErrorKind::unsupported, "{} is not supported: PCRE2 says \"{}\"", where,
           reinterpret_cast<const char*>(message));
    }
    // Where memory may not be executable, matching is slower.
    has_jit = pcre2_jit_compile(code, PCRE2_JIT_COMPLETE) == 0;
  }
  ~Compiled() { pcre2_code_free(code); }
  Compiled(const Compiled&) = delete;
  Compiled& operator=(const Compiled&) = delete;

  pcre2_code* code = nullptr;
  bool has_jit = false;
};

// One walk through a text.
class Regex::Search {
 public:
  Search(const Regex& regex, const Symbols& text)
      : regex_(regex),
        text_(text),
        data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        deadline_(std::chrono::steady_clock::now() + kTime + kTimePerByte * text.size()) {
    require(data_ && context_, ErrorKind::out_of_memory, "{}: no memory to match it",
            regex_.where_);
    const std::size_t steps = kMatchSteps + kMatchStepsPerByte * text.size();
    pcre2_set_match_limit(context_.get(),
                          static_cast<std::uint32_t>(std::min<std::size_t>(steps, UINT32_MAX)));
    pcre2_set_heap_limit(context_.get(), static_cast<std::uint32_t>(kHeapKib + text.size() / 2));
  }

  // The next match at or after `from`, as places in the symbols.
  bool find(std::size_t from, std::size_t& begin, std::size_t& end) {
    int count = match(from, 0);
    if (count == PCRE2_ERROR_JIT_STACKLIMIT && !stack_) {
      make_stack();
      count = match(from, 0);
    }
    if (count == PCRE2_ERROR_JIT_STACKLIMIT) count = match(from, PCRE2_NO_JIT);
    if (count == PCRE2_ERROR_NOMATCH) return false;
    if (count < 0) fail_endless(count);
    if (std::chrono::steady_clock::now() > deadline_) fail_endless(PCRE2_ERROR_MATCHLIMIT);
    const PCRE2_SIZE* places = pcre2_get_ovector_pointer(data_.get());
    begin = places[0];
    end = places[1];
    return true;
  }

 private:
  // Few texts need more than the compiled code has of its own.
  void make_stack() {
    const std::size_t most = kStackBytes + kStackBytesPerByte * text_.size();
    stack_.reset(pcre2_jit_stack_create(kStackBytes, std::min(most, kMaxStackBytes), nullptr));
    if (stack_) pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
  }

  int match(std::size_t from, std::uint32_t options) {
    return pcre2_match(regex_.compiled_->code, text_.data(), text_.size(), from, options,
                       data_.get(), context_.get());
  }

  [[noreturn]] void fail_endless(int error) const {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    fail(ErrorKind::unsupported,
         "{} takes too long for a text of {} characters (PCRE2: {}); use a tokenizer whose regular "
         "expression does not backtrack so much",
         regex_.where_, text_.size(), reinterpret_cast<const char*>(message));
  }

  struct MatchDataDeleter {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  struct MatchContextDeleter {
    void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  };
  struct JitStackDeleter {
    void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
  };

  const Regex& regex_;
  const Symbols& text_;
  std::unique_ptr<pcre2_match_data, MatchDataDeleter> data_;
  std::unique_ptr<pcre2_match_context, MatchContextDeleter> context_;
  std::unique_ptr<pcre2_jit_stack, JitStackDeleter> stack_;
  const std::chrono::steady_clock::time_point deadline_;
};

Regex::Regex(std::string_view pattern, const std::string& where) : where_(where) {
  const RegexSyntax syntax = read_regex(pattern, where);
  SymbolTable table(syntax.sets, where);
  std::string translated;
  for (const RegexSyntax::Element& element : syntax.elements) {
    translated += element.set ? table.class_of(*element.set) : element.shape;
  }
  symbols_ = table.take();
  compiled_ = std::make_unique<const Compiled>(translated, where);
}

Regex::~Regex() = default;

std::vector<TextPart> Regex::find_all(std::string_view text) const {
  std::vector<TextPart> parts;
  for_each_part(text, [&](const TextPart& part) { parts.push_back(part); });
  return parts;
}

void Regex::for_each_part(std::string_view text,
                          const std::function<void(const TextPart&)>& on_part) const {
  Symbols symbols;
  symbols.reserve(text.size());
  for (std::size_t at = 0, length = 0; at < text.size(); at += length) {
    symbols.push_back(symbols_[decode_valid(text.data() + at, length)]);
  }
  std::size_t place = 0, byte = 0;  // the same one, in symbols and in the text
  const auto byte_of = [&](std::size_t symbol) {
    for (std::size_t length = 0; place < symbol; ++place, byte += length) {
      decode_valid(text.data() + byte, length);
    }
    return byte;
  };

  Search search(*this, symbols);
  std::size_t done = 0;  // bytes
  std::size_t from = 0;  // symbols
  std::size_t last_end = SIZE_MAX;
  std::size_t begin = 0, end = 0;
  // As the crate onig goes on: an empty match behind another match does not count.
  while (from <= symbols.size() && search.find(from, begin, end)) {
    if (begin == end && end == last_end) {
      ++from;
      continue;
    }
    from = last_end = end;
    const std::size_t begin_byte = byte_of(begin), end_byte = byte_of(end);
    if (done != begin_byte) on_part({done, begin_byte, false});
    on_part({begin_byte, end_byte, true});
    done = end_byte;
  }
  if (done != text.size()) on_part({done, text.size(), false});
}

}  // namespace clusterfusion
