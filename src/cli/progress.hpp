// A progress bar on standard error, on a terminal only.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace clusterfusion::cli {

// One line of at most `columns` characters:
//   "perplexity [#######             ]  35 %  1024/2896 tokens, 12 s left"
std::string progress_line(std::string_view label, std::int64_t done, std::int64_t total,
                          std::string_view unit, double seconds, int columns);

// Redraws itself in place, ten times a second at most, and leaves no trace when destroyed. Work
// that is done within `patience` shows nothing.
class ProgressBar {
 public:
  ProgressBar(std::string label, std::string unit, bool quiet,
              std::chrono::milliseconds patience = {});
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void update(std::int64_t done, std::int64_t total);

 private:
  using Clock = std::chrono::steady_clock;
  const std::string label_;
  const std::string unit_;
  const bool shown_;
  const std::chrono::milliseconds patience_;
  const Clock::time_point start_ = Clock::now();
  std::optional<Clock::time_point> last_drawn_;
};

}  // namespace clusterfusion::cli
