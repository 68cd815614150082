#include "io/json.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/fail.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxQuotedBytes = 200;

// At most `max_bytes` of well-formed UTF-8, never ending inside a character.
std::string_view shortened(std::string_view text, std::size_t max_bytes) {
  if (text.size() <= max_bytes) return text;
  std::size_t end = max_bytes;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end);
}

// Bytes that are no printable ASCII become '?': the text may hold anything.
std::string printable(std::string_view text) {
  std::string result(text.substr(0, kMaxQuotedBytes));
  std::replace_if(
      result.begin(), result.end(), [](char c) { return c < 0x20 || c > 0x7E; }, '?');
  return result;
}

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// The same document with its longest integers as floating-point numbers: simdjson reads no integer
// beyond 64 bits, and transformers writes 10^30 for a tokenizer without a limit.
std::string with_long_integers_as_floats(std::string_view text) {
  constexpr std::size_t kDigits = 18;  // that always fit
  std::string result;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size();) {
    if (in_string || !is_digit(text[i])) {
      if (text[i] == '"') in_string = !in_string;
      const std::size_t count = in_string && text[i] == '\\' ? 2 : 1;
      result += text.substr(i, count);
      i += count;
      continue;
    }
    // A whole number, with the digits of its fraction and exponent.
    const std::size_t begin = i;
    while (i < text.size() && is_digit(text[i])) ++i;
    const bool is_long = i - begin > kDigits;
    const bool goes_on = i < text.size() && (text[i] == '.' || text[i] == 'e' || text[i] == 'E');
    while (goes_on && i < text.size() &&
           std::string_view("0123456789.eE+-").find(text[i]) != std::string_view::npos)
      ++i;
    result += text.substr(begin, i - begin);
    if (is_long && !goes_on) result += "e0";
  }
  return result;
}

// As PowerShell writes text.
bool is_utf16(std::string_view text) {
  return text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF");
}

// simdjson says what is wrong but not where; on the way out, a second parser finds the place.
[[noreturn]] void fail_broken(std::string_view text, const std::string& file,
                              simdjson::error_code error) {
  require(!is_utf16(text), ErrorKind::malformed,
          "{} is UTF-16 text (its first bytes are a byte order mark); save it as UTF-8", file);
  if (text.empty()) {
    fail(ErrorKind::malformed, "{}: broken JSON at line 1, byte 0: unexpected end of input", file);
  }
  try {
    const auto discard = [](int, nlohmann::json::parse_event_t, nlohmann::json&) { return false; };
    [[maybe_unused]] const auto nothing = nlohmann::json::parse(text.begin(), text.end(), discard);
  } catch (const nlohmann::json::parse_error& broken) {
    const std::size_t position = std::min<std::size_t>(broken.byte, text.size());
    const std::string_view before = text.substr(0, position);
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const std::size_t line_start = before.rfind('\n') + 1;  // npos + 1 is 0
    const std::string_view reason = broken.what();
    const std::size_t reason_start = reason.find("column");
    const std::size_t colon = reason.find(": ", reason_start == reason.npos ? 0 : reason_start);
    fail(ErrorKind::malformed, "{}: broken JSON at line {}, column {} (byte {}): {}", file, line,
         position - line_start, position,
         printable(colon == reason.npos ? reason : reason.substr(colon + 2)));
  } catch (const nlohmann::json::exception&) {
    // Well-formed, but beyond what is read here (a number too large, say): simdjson's words do.
  }
  fail(ErrorKind::malformed, "{}: JSON that cannot be read: {}", file,
       simdjson::error_message(error));
}

}  // namespace

std::string quote(std::string_view text) {
  const std::string_view kept = shortened(text, kMaxQuotedBytes);
  const nlohmann::json escaped = std::string(kept) + (kept.size() < text.size() ? "..." : "");
  return escaped.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

void JsonValue::fail_expected(std::string_view expected) const {
  const std::string found = simdjson::minify(element_);
  const std::string_view kept = shortened(found, kMaxQuotedBytes);
  fail(ErrorKind::malformed, "{} must be {}, found {}{}", where_, expected, kept,
       kept.size() < found.size() ? "..." : "");
}

std::int64_t JsonValue::integer(IntegerRange range) const {
  std::int64_t value = 0;
  const bool is_integer = element_.get_int64().get(value) == simdjson::SUCCESS;
  if (!is_integer || value < range.min || value > range.max) {
    fail_expected(fmt::format("an integer from {} to {}", range.min, range.max));
  }
  return value;
}

double JsonValue::number(NumberRange range) const {
  double value = 0;
  const bool is_number = element_.get_double().get(value) == simdjson::SUCCESS;
  const bool is_above = range.above_min ? value > range.min : value >= range.min;
  if (!is_number || !is_above || !(value <= range.max)) {
    fail_expected(range.above_min
                      ? fmt::format("a number above {} and at most {}", range.min, range.max)
                      : fmt::format("a number from {} to {}", range.min, range.max));
  }
  return value;
}

bool JsonValue::boolean() const {
  bool value = false;
  if (element_.get_bool().get(value) != simdjson::SUCCESS) fail_expected("true or false");
  return value;
}

std::string_view JsonValue::string() const {
  std::string_view value;
  if (element_.get_string().get(value) != simdjson::SUCCESS) fail_expected("a string");
  return value;
}

std::vector<JsonValue> JsonValue::array() const {
  simdjson::dom::array array;
  if (element_.get_array().get(array) != simdjson::SUCCESS) fail_expected("a list");
  std::vector<JsonValue> values;
  for (const simdjson::dom::element element : array) {
    values.emplace_back(element, fmt::format("{}[{}]", where_, values.size()));
  }
  return values;
}

JsonObject::JsonObject(const JsonValue& value) : where_(value.where_) {
  simdjson::dom::object object;
  if (value.element_.get_object().get(object) != simdjson::SUCCESS) {
    value.fail_expected("an object {...}");
  }
  for (const auto field : object) members_.emplace_back(field.key, field.value);
  const auto by_key = [](const Member& a, const Member& b) { return a.first < b.first; };
  const auto same_key = [](const Member& a, const Member& b) { return a.first == b.first; };
  std::sort(members_.begin(), members_.end(), by_key);
  const auto twice = std::adjacent_find(members_.begin(), members_.end(), same_key);
  if (twice != members_.end()) {
    fail(ErrorKind::malformed, "{}: the key {} stands there twice; expected each key once", where_,
         quote(twice->first));
  }
}

std::optional<JsonValue> JsonObject::find(std::string_view key) const {
  const auto before = [](const Member& member, std::string_view k) { return member.first < k; };
  const auto found = std::lower_bound(members_.begin(), members_.end(), key, before);
  if (found == members_.end() || found->first != key) return std::nullopt;
  return value_of(*found);
}

std::optional<JsonValue> JsonObject::find_non_null(std::string_view key) const {
  std::optional<JsonValue> value = find(key);
  if (value && value->is_null()) value.reset();
  return value;
}

JsonValue JsonObject::at(std::string_view key) const {
  std::optional<JsonValue> value = find(key);
  require(value.has_value(), ErrorKind::malformed, "{} has no key {}", where_, quote(key));
  return *value;
}

JsonValue JsonObject::value_of(const Member& member) const {
  return JsonValue(member.second, fmt::format("{}: {}", where_, quote(member.first)));
}

JsonDocument::JsonDocument(std::string_view text, std::string file) : file_(std::move(file)) {
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  simdjson::error_code error = parser_.parse(simdjson::padded_string(text)).get(root_);
  if (error) {
    const std::string readable = with_long_integers_as_floats(text);
    if (readable.size() != text.size())
      error = parser_.parse(simdjson::padded_string(readable)).get(root_);
  }
  if (error) fail_broken(text, file_, error);
}

}  // namespace clusterfusion
