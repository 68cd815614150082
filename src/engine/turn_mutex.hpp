// A mutex that serves its waiters in the order of their arrival, so that threads that lock it again
// and again take turns (std::mutex lets one of them starve the others).
#pragma once

#include <cstdint>
#include <mutex>

#include "base/condition_variable.hpp"

namespace clusterfusion {

class TurnMutex {  // meets BasicLockable
 public:
  void lock() {
    std::unique_lock guard(mutex_);
    const std::uint64_t ticket = next_ticket_++;
    turn_.wait(guard, [&] { return serving_ == ticket; });
  }
  void unlock() {
    {
      const std::lock_guard guard(mutex_);
      ++serving_;
    }
    turn_.notify_all();
  }

 private:
  std::mutex mutex_;
  ConditionVariable turn_;
  std::uint64_t next_ticket_ = 0;
  std::uint64_t serving_ = 0;
};

}  // namespace clusterfusion
