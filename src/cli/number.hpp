// Numbers as a person types them, read strictly: the whole text, decimal, finite, in range.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace clusterfusion::cli {

// Nothing if `text` is not wholly a number of type T ("12x", " 1", "0x1f", "nan", too large).
template <typename T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isfinite(value)) return std::nullopt;
  }
  return value;
}

// Adds an option that takes one number in [min, max]. CLI11's own conversion would read "010" as
// octal and take "nan"; here the text is checked first and handed on in canonical form.
template <typename T>
CLI::Option* add_number(CLI::App& app, const std::string& names, T& value,
                        const std::string& description, T min = std::numeric_limits<T>::lowest(),
                        T max = std::numeric_limits<T>::max()) {
  const auto check = [min, max](std::string& text) -> std::string {
    const std::optional<T> number = parse_number<T>(text);
    if (number && *number >= min && *number <= max) {
      text = fmt::to_string(*number);
      return {};
    }
    std::string expected = std::is_floating_point_v<T> ? "a finite number" : "a whole number";
    // A whole number that is beyond the type itself deserves to hear of its limits.
    const bool is_whole =
        !text.empty() && text.find_first_not_of("0123456789", text[0] == '-') == std::string::npos;
    if (max != std::numeric_limits<T>::max() || (!number && is_whole)) {
      expected += fmt::format(" from {} to {}", min, max);
    } else if (min != std::numeric_limits<T>::lowest()) {
      expected += fmt::format(" of at least {}", min);
    }
    return fmt::format("expected {}, found \"{}\"", expected, text);
  };
  return app.add_option(names, value, description)
      ->transform(CLI::Validator(check, ""))
      ->type_name("N");
}

// Whole numbers separated by commas, white space or both, as in "1,2 3" or "[1, 2, 3]"; may be
// empty. `what` names the list in messages. Errors: invalid_argument with the entry's index.
std::vector<std::int64_t> parse_integer_list(std::string_view text, std::int64_t min,
                                             std::int64_t max, std::string_view what);

}  // namespace clusterfusion::cli
