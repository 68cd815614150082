#include "cli/text_pairs.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "base/fail.hpp"
#include "io/json.hpp"

namespace clusterfusion::cli {
namespace {

constexpr std::string_view kJsonSpace = " \t\r\n";

TextPair parse_pair(std::string_view line, std::string where) {
  const JsonDocument document(line, where);
  const JsonObject object(document.root());
  return {.context = std::string(object.at("context").string()),
          .continuation = std::string(object.at("continuation").string()),
          .where = std::move(where)};
}

}  // namespace

std::vector<TextPair> parse_text_pairs(std::string_view text, const std::string& source) {
  std::vector<TextPair> pairs;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(kJsonSpace) == std::string_view::npos) continue;
    pairs.push_back(parse_pair(line, fmt::format("{}, line {}", source, number)));
  }
  require(!pairs.empty(), ErrorKind::malformed,
          "{} has no pair; expected lines {{\"context\": \"...\", \"continuation\": \"...\"}}",
          source);
  return pairs;
}

}  // namespace clusterfusion::cli
