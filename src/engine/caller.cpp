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
  changed_.notify_all();
}

void Caller::fail(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    num_live_ = 0;
    error_ = std::move(error);
  }
  changed_.notify_all();
}

void Caller::expect(std::int64_t sequences) {
  const std::lock_guard lock(mutex_);
  num_live_ += sequences;
}

std::deque<SequenceNews> Caller::wait_for_news(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, patience, [this] { return !inbox_.empty() || error_; });
  if (inbox_.empty() && error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return std::exchange(inbox_, {});
}

void Caller::wait_for_end() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return num_live_ == 0; });
  inbox_.clear();
  error_ = nullptr;
}

}  // namespace clusterfusion
