// Where a caller and the scheduler's thread meet.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/condition_variable.hpp"
#include "clusterfusion/engine.hpp"
#include "clusterfusion/error.hpp"

namespace clusterfusion {

// News of one sequence.
struct SequenceNews {
  std::size_t index = 0;  // the caller's number of it
  std::optional<SampledToken> token;
  std::vector<ScoredToken> prompt_scores;     // that come next
  std::optional<FinishReason> finish_reason;  // in its last news
  Statistics statistics;                      // so far; what can be derived is left out
  double decode_bytes = 0;                    // read by the decode steps that it took part in
};

// One call of Engine::start(): its sequences and their news.
class Caller {
 public:
  // The scheduler's side.
  // `ended` of the sequences are gone, released by the backend too.
  void post(std::vector<SequenceNews> news, std::int64_t ended);
  // All sequences are gone; the error comes after the news.
  void fail(const std::exception_ptr& error);
  bool is_cancelled() const noexcept { return cancelled_.load(std::memory_order_relaxed); }

  // The caller's side.
  Caller() = default;
  // `on_change` is called behind each post() and fail(), on the scheduler's thread.
  explicit Caller(std::function<void()> on_change) : on_change_(std::move(on_change)) {}
  void expect(std::int64_t sequences);  // before they are submitted
  // Its sequences are to be dropped. Also from a signal handler.
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }
  // Waits for news or the end, but no longer than `patience`; nothing new gives an empty deque.
  // Errors: that of the sequences, once.
  std::deque<SequenceNews> wait_for_news(std::chrono::milliseconds patience);
  // The same without waiting.
  std::deque<SequenceNews> take_news();
  // Whether all sequences are gone.
  bool has_ended();
  // Waits until all sequences are gone, and forgets the rest of the news.
  void wait_for_end();

  const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();

  // The scheduler's own notes.
  std::int64_t num_active = 0;   // sequences that hold pages
  std::uint64_t last_piece = 0;  // when a piece of a prompt was last computed, in rounds
  std::vector<SequenceNews> outbox;
  std::int64_t num_ended = 0;  // to be posted

 private:
  void tell();
  std::deque<SequenceNews> take_locked();

  const std::function<void()> on_change_;
  std::atomic<bool> cancelled_ = false;
  static_assert(std::atomic<bool>::is_always_lock_free, "cancel() is for signal handlers");
  std::mutex mutex_;
  ConditionVariable changed_;
  std::deque<SequenceNews> inbox_;
  std::int64_t num_live_ = 0;
  // An Error in its words, so that each thread has an exception of its own; any other as it is.
  struct Failure {
    ErrorKind kind = ErrorKind::internal;
    std::string message;
    std::exception_ptr other;
  };
  std::optional<Failure> failure_;
};

}  // namespace clusterfusion
