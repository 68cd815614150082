#include "engine/timing.hpp"

#include <algorithm>
#include <chrono>

#include "base/fail.hpp"
#include "engine/prepare_request.hpp"

namespace clusterfusion {
namespace {

using Clock = std::chrono::steady_clock;

// So many steps change the context by little, and hide what it costs to start them.
constexpr std::int64_t kMaxBurst = 16;

// One sequence that is brought back to where it began after each burst of steps.
class Observed {
 public:
  Observed(SharedBackend& backend, std::span<const TokenId> prompt, std::int64_t max_burst)
      : backend_(backend),
        prompt_(prompt),
        max_positions_(checked_limit(backend, prompt)),
        burst_(std::min(
            {kMaxBurst, max_burst, std::int64_t{backend.info().decode_ahead}, max_positions_ - 1})),
        start_(std::min(std::ssize(prompt), max_positions_ - burst_)),
        sequence_(backend, {}, std::max(std::ssize(prompt), start_ + burst_)) {}

  std::int64_t burst() const noexcept { return burst_; }
  // Positions that hold keys and values before a burst.
  std::int64_t start() const noexcept { return start_; }

  // Seconds from the prompt to the token after it.
  double prefill() {
    const Clock::time_point begin = Clock::now();
    for (std::span<const TokenId> rest = prompt_; !rest.empty();) {
      const auto chunk = static_cast<std::size_t>(backend_.info().prefill_chunk);
      const std::size_t count = std::min(chunk, rest.size());
      PrefillOutput output;
      if (count == rest.size()) output.sampled = &next_;
      backend_.run(
          [&](Backend& device) { device.prefill(sequence_.id(), rest.first(count), output); });
      rest = rest.subspan(count);
    }
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    backend_.run([&](Backend& device) { device.truncate(sequence_.id(), start_); });
    return seconds.count();
  }

  // Seconds for a burst of steps.
  double decode() {
    std::vector<SampledToken> sampled(static_cast<std::size_t>(burst_));
    const SequenceId id = sequence_.id();
    return backend_.run([&](Backend& device) {
      const Clock::time_point begin = Clock::now();
      device.decode({&id, 1}, {&next_.token, 1}, static_cast<std::int32_t>(burst_), sampled, {});
      const std::chrono::duration<double> seconds = Clock::now() - begin;
      device.truncate(id, start_);
      return seconds.count();
    });
  }

  std::vector<TimelineEvent> record() {
    return backend_.run(
        [&](Backend& device) { return device.record_timeline(sequence_.id(), next_.token); });
  }

 private:
  static std::int64_t checked_limit(SharedBackend& backend, std::span<const TokenId> prompt) {
    const std::int64_t limit = backend.info().max_positions;
    check_tokens(prompt, backend.model().config().vocab_size, "the prompt");
    require(!prompt.empty() && std::ssize(prompt) < limit, ErrorKind::invalid_argument,
            "the prompt has {} tokens; expected at least 1, and fewer than the {} of the context, "
            "so that a step can follow",
            prompt.size(), limit);
    return limit;
  }

  SharedBackend& backend_;
  std::span<const TokenId> prompt_;
  const std::int64_t max_positions_, burst_, start_;
  SequenceHandle sequence_;
  SampledToken next_;
};

}  // namespace

DecodeTiming compute_decode_timing(SharedBackend& backend, std::span<const TokenId> prompt,
                                   std::int64_t num_tokens) {
  require(num_tokens >= 1, ErrorKind::invalid_argument,
          "the number of tokens to decode must be at least 1, got {}", num_tokens);
  Observed observed(backend, prompt, num_tokens);
  DecodeTiming timing;
  timing.prefill_seconds = observed.prefill();
  observed.decode();  // the first steps also wake what slept
  for (std::int64_t done = 0; done < num_tokens; done += observed.burst()) {
    timing.seconds_per_token.push_back(observed.decode() / static_cast<double>(observed.burst()));
  }
  // The mean of start + 1 ... start + burst positions, the step's own one included.
  const double positions =
      static_cast<double>(observed.start()) + static_cast<double>(observed.burst() + 1) / 2;
  timing.bytes_per_token = static_cast<double>(backend.model().bytes_per_token()) +
                           positions * static_cast<double>(backend.info().kv_bytes_per_position);
  return timing;
}

std::vector<TimelineEvent> compute_timeline(SharedBackend& backend,
                                            std::span<const TokenId> prompt) {
  Observed observed(backend, prompt, kMaxBurst);
  observed.prefill();
  observed.decode();
  return observed.record();
}

}  // namespace clusterfusion
