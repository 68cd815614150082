#include "cli/number.hpp"

#include "base/fail.hpp"

namespace clusterfusion::cli {

std::vector<std::int64_t> parse_integer_list(std::string_view text, std::int64_t min,
                                             std::int64_t max, std::string_view what) {
  constexpr std::string_view kSeparators = ", \t\r\n\v\f";
  const auto trim = [&](std::string_view part) {
    const auto first = part.find_first_not_of(kSeparators);
    if (first == std::string_view::npos) return std::string_view();
    return part.substr(first, part.find_last_not_of(kSeparators) - first + 1);
  };
  text = trim(text);
  if (text.size() >= 2 && text.front() == '[' && text.back() == ']') {
    text = trim(text.substr(1, text.size() - 2));
  }
  std::vector<std::int64_t> numbers;
  while (!text.empty()) {
    const std::string_view entry = text.substr(0, text.find_first_of(kSeparators));
    const std::optional<std::int64_t> number = parse_number<std::int64_t>(entry);
    require(number && *number >= min && *number <= max, ErrorKind::invalid_argument,
            "{}: entry {} is \"{}\"; expected a whole number from {} to {}", what, numbers.size(),
            entry.substr(0, 40), min, max);
    numbers.push_back(*number);
    text = trim(text.substr(entry.size()));
  }
  return numbers;
}

}  // namespace clusterfusion::cli
