#include "cli/progress.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "cli/report_format.hpp"
#include "cli/terminal.hpp"

namespace clusterfusion::cli {
namespace {

constexpr std::string_view kEraseLine = "\r\x1b[K";

}  // namespace

std::string progress_line(std::string_view label, std::int64_t done, std::int64_t total,
                          std::string_view unit, double seconds, int columns) {
  const double share = total > 0 ? std::clamp(double(done) / double(total), 0.0, 1.0) : 0.0;
  std::string numbers = fmt::format("{:3.0f} %  {}/{} {}", 100 * share, done, total, unit);
  if (done > 0 && done < total) {
    numbers += fmt::format(", {} left", format_duration(seconds * (1 / share - 1)));
  }
  constexpr int kMaxBar = 30;
  const int room = columns - int(label.size()) - int(numbers.size()) - 5;
  std::string line = fmt::format("{} ", label);
  if (const int bar = std::min(kMaxBar, room); bar >= 5) {
    const int filled = static_cast<int>(share * bar);
    line += fmt::format("[{:#<{}}{: <{}}] ", "", filled, "", bar - filled);
  }
  line += numbers;
  // One column stays free: a full last column makes some terminals wrap.
  return line.substr(0, static_cast<std::size_t>(std::max(columns - 1, 0)));
}

ProgressBar::ProgressBar(std::string label, std::string unit, bool quiet,
                         std::chrono::milliseconds patience)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      shown_(!quiet && stderr_is_terminal()),
      patience_(patience) {}

ProgressBar::~ProgressBar() {
  if (last_drawn_) write_stderr(kEraseLine);
}

void ProgressBar::update(std::int64_t done, std::int64_t total) {
  if (!shown_) return;
  const Clock::time_point now = Clock::now();
  if (now - start_ < patience_) return;
  if (last_drawn_ && done < total && now - *last_drawn_ < std::chrono::milliseconds(100)) return;
  last_drawn_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  write_stderr(fmt::format("{}{}", kEraseLine,
                           progress_line(label_, done, total, unit_, seconds, terminal_columns())));
}

}  // namespace clusterfusion::cli
