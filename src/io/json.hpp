// JSON that is read with expectations: every error names the file, the key, what was expected and
// what was found.
#pragma once

#include <simdjson.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace clusterfusion {

// `text` in double quotes, as JSON would write it, shortened if it is long: for messages.
std::string quote(std::string_view text);

// A closed interval.
struct IntegerRange {
  std::int64_t min = 0;
  std::int64_t max = std::numeric_limits<std::int64_t>::max();
};
struct NumberRange {
  double min = 0;
  double max = std::numeric_limits<double>::max();
  bool above_min = false;  // without the least itself
};

// A value somewhere in a JSON text. Lives as long as its JsonDocument. All errors are `malformed`.
class JsonValue {
 public:
  JsonValue(simdjson::dom::element element, std::string where)
      : element_(element), where_(std::move(where)) {}

  bool is_null() const noexcept { return element_.is_null(); }
  bool is_array() const noexcept { return element_.is_array(); }
  bool is_object() const noexcept { return element_.is_object(); }

  std::int64_t integer(IntegerRange range = {}) const;
  double number(NumberRange range = {}) const;  // integers are numbers too
  bool boolean() const;
  std::string_view string() const;
  std::vector<JsonValue> array() const;

  // Where the value stands, for messages: `config.json: "eos_token_id"`.
  const std::string& where() const noexcept { return where_; }

  // Throws: `expected`, and the value found.
  [[noreturn]] void fail_expected(std::string_view expected) const;

 private:
  friend class JsonObject;
  simdjson::dom::element element_;
  std::string where_;
};

// The members of an object. Lives as long as its JsonDocument.
class JsonObject {
 public:
  using Member = std::pair<std::string_view, simdjson::dom::element>;

  // Errors: malformed if the value is no object or has the same key twice.
  explicit JsonObject(const JsonValue& value);

  // Nothing if there is no such key.
  std::optional<JsonValue> find(std::string_view key) const;
  // Nothing if there is no such key, or if it is null.
  std::optional<JsonValue> find_non_null(std::string_view key) const;
  // Errors: malformed if there is no such key.
  JsonValue at(std::string_view key) const;

  // In the order of the keys.
  const std::vector<Member>& members() const noexcept { return members_; }
  JsonValue value_of(const Member& member) const;

 private:
  std::string where_;
  std::vector<Member> members_;
};

class JsonDocument {
 public:
  // Parses `text`, UTF-8 with or without a byte order mark; `file` stands for it in messages.
  // Errors: malformed, with line and column.
  JsonDocument(std::string_view text, std::string file);
  JsonDocument(const JsonDocument&) = delete;
  JsonDocument& operator=(const JsonDocument&) = delete;

  JsonValue root() const { return JsonValue(root_, file_); }

 private:
  std::string file_;
  simdjson::dom::parser parser_;
  simdjson::dom::element root_;
};

}  // namespace clusterfusion
