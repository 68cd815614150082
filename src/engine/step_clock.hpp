// How long steps take, and so how much may be done at a time.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace clusterfusion {

inline double machine_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class StepClock {
 public:
  // A new request finds the running burst over after this time, if one step is not longer.
  static constexpr double kLongestBurstSeconds = 0.025;

  void note_burst(double seconds, std::int32_t steps) noexcept {
    constexpr double kForget = 0.8;  // a slow step is remembered for a few bursts
    step_seconds_ = std::max(seconds / steps, kForget * step_seconds_);
  }
  void note_piece(double seconds, std::int64_t tokens) noexcept {
    piece_token_seconds_ = seconds / static_cast<double>(tokens);
  }

  // Of a decode step of all sequences, on the safe side; 0 if none has been seen.
  double step_seconds() const noexcept { return step_seconds_; }
  // Of a piece of so many tokens, if each takes as long as those of the last piece.
  double piece_seconds(std::int64_t tokens) const noexcept {
    return piece_token_seconds_ * static_cast<double>(tokens);
  }

  // Steps of the next burst; one step before any has been seen.
  std::int32_t burst_steps(std::int32_t most) const noexcept {
    if (step_seconds_ <= 0) return 1;
    const double fitting = std::min<double>(kLongestBurstSeconds / step_seconds_, most);
    return std::max(1, static_cast<std::int32_t>(fitting));
  }

  // Tokens of a piece of a prompt that takes no longer than a step, where pieces may have any size;
  // but `least` (BackendInfo::least_piece), and at most `most`.
  std::int64_t piece_tokens(std::int64_t least, std::int64_t most) const noexcept {
    constexpr std::int64_t kFirst = 16;
    if (piece_token_seconds_ <= 0 || step_seconds_ <= 0)
      return std::min(std::max(kFirst, least), most);
    const double fitting = step_seconds_ / piece_token_seconds_;
    return std::min(most, std::max(least, static_cast<std::int64_t>(std::min(fitting, 1e6))));
  }

 private:
  double step_seconds_ = 0;
  double piece_token_seconds_ = 0;
};

}  // namespace clusterfusion
