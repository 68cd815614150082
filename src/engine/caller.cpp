#include "engine/caller.hpp"

#include <iterator>
#include <utility>

namespace clusterfusion {

void Caller::post(std::vector<SequenceNews> news, std::int64_t ended) {
  {
    const std::lock_guard lock(mutex_);
    std::move(news.begin(), news.end(), std::back_inserter(inbox_));
    num_live_ -= ended;
  }
  tell();
}

void Caller::fail(const std::exception_ptr& error) {
  Failure failure;
  try {
    std::rethrow_exception(error);
  } catch (const Error& known) {
    failure.kind = known.kind();
    failure.message = known.what();
  } catch (...) {
    failure.other = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    num_live_ = 0;
    failure_ = std::move(failure);
  }
  tell();
}

void Caller::tell() {
  changed_.notify_all();
  if (on_change_) on_change_();
}

void Caller::expect(std::int64_t sequences) {
  const std::lock_guard lock(mutex_);
  num_live_ += sequences;
}

std::deque<SequenceNews> Caller::wait_for_news(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, patience, [this] { return !inbox_.empty() || failure_; });
  return take_locked();
}

std::deque<SequenceNews> Caller::take_news() {
  const std::lock_guard lock(mutex_);
  return take_locked();
}

bool Caller::has_ended() {
  const std::lock_guard lock(mutex_);
  return num_live_ == 0;
}

std::deque<SequenceNews> Caller::take_locked() {
  if (inbox_.empty() && failure_) {
    const Failure failure = *std::exchange(failure_, std::nullopt);
    if (failure.other) std::rethrow_exception(failure.other);
    throw Error(failure.kind, failure.message);
  }
  return std::exchange(inbox_, {});
}

void Caller::wait_for_end() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return num_live_ == 0; });
  inbox_.clear();
  failure_.reset();
}

}  // namespace clusterfusion
