#include "cli/report_format.hpp"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <iterator>

namespace clusterfusion::cli {
namespace {

// `value` >= 0 with three significant digits, without an exponent below 10^15.
std::string three_digits(double value) {
  const int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return fmt::format("{:.{}f}", value, decimals);
}

}  // namespace

std::string format_duration(double seconds) {
  if (seconds < 0.9995e-3) return three_digits(seconds * 1e6) + " us";
  if (seconds < 0.9995) return three_digits(seconds * 1e3) + " ms";
  if (seconds < 99.5) return three_digits(seconds) + " s";
  const auto whole = std::llround(seconds);
  if (whole < 3600) return fmt::format("{} min {} s", whole / 60, whole % 60);
  return fmt::format("{} h {} min", whole / 3600, whole % 3600 / 60);
}

std::string format_bytes(double bytes) {
  constexpr std::array kUnits = {"B", "kB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (bytes >= 999.5 && unit + 1 < kUnits.size()) {
    bytes /= 1000;
    ++unit;
  }
  return fmt::format("{} {}", unit == 0 ? fmt::format("{:.0f}", bytes) : three_digits(bytes),
                     kUnits[unit]);
}

std::string format_count(std::int64_t count, std::string_view unit) {
  std::string digits = fmt::to_string(count);
  const std::size_t first_digit = count < 0 ? 1 : 0;
  for (std::size_t at = digits.size(); at > first_digit + 3; at -= 3) digits.insert(at - 3, 1, ',');
  return fmt::format("{} {}{}", digits, unit, count == 1 ? "" : "s");
}

std::string format_device(const EngineInfo& info) {
  return fmt::format("{}, {} ({})", info.device, info.device_description, info.device_reason);
}

std::string format_statistics(const Statistics& statistics, std::string_view finish_reason) {
  std::string text = "prompt: " + format_count(statistics.prompt_tokens, "token");
  if (statistics.new_tokens > 0) {
    text += ", first token after " + format_duration(statistics.time_to_first_token_seconds);
  }
  text +=
      fmt::format("\noutput: {} ({})", format_count(statistics.new_tokens, "token"), finish_reason);
  if (statistics.seconds_per_token > 0) {
    text += fmt::format(
        ", {}/token, {} tokens/s, {}/s", format_duration(statistics.seconds_per_token),
        three_digits(statistics.tokens_per_second), format_bytes(statistics.bytes_per_second));
    if (statistics.read_ceiling_bytes_per_second > 0) {
      text += fmt::format(", {:.0f} % of the read ceiling of {}/s", 100 * statistics.ceiling_share,
                          format_bytes(statistics.read_ceiling_bytes_per_second));
    }
  }
  text += "\n";
  if (statistics.draft_steps == 0) return text;
  return text + fmt::format("draft: {} in {}, {} accepted ({:.0f} %), {} a step; {} in all\n",
                            format_count(statistics.draft_proposed, "token"),
                            format_count(statistics.draft_steps, "step"), statistics.draft_accepted,
                            100.0 * static_cast<double>(statistics.draft_accepted) /
                                static_cast<double>(statistics.draft_proposed),
                            three_digits(statistics.mean_accepted),
                            format_count(statistics.decode_steps, "step"));
}

}  // namespace clusterfusion::cli
