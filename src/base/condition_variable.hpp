// std::condition_variable, also for forked processes and for systems with the library of GCC 11
// (RHEL 9 and its relatives).
#pragma once

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

// GCC 12 gave wait() a new symbol version for no longer being noexcept. The old one is in every
// libstdc++, and it is the only symbol that would keep the wheel from manylinux_2_34.
#if defined(__GLIBCXX__) && defined(__x86_64__)
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif

namespace clusterfusion {

// In a forked process nobody waits any more, though the copied variable counts those who did, and
// its destructor would wait for them for ever. There it is not destroyed.
class ConditionVariable {
 public:
  ConditionVariable() = default;
  ~ConditionVariable() {
    if (::getpid() != process_) static_cast<void>(variable_.release());
  }
  ConditionVariable(const ConditionVariable&) = delete;
  ConditionVariable& operator=(const ConditionVariable&) = delete;

  void notify_all() noexcept { variable_->notify_all(); }
  template <typename Predicate>
  void wait(std::unique_lock<std::mutex>& lock, Predicate&& predicate) {
    variable_->wait(lock, std::forward<Predicate>(predicate));
  }
  // Whether the predicate is true.
  template <typename Duration, typename Predicate>
  bool wait_for(std::unique_lock<std::mutex>& lock, const Duration& patience,
                Predicate&& predicate) {
    return variable_->wait_for(lock, patience, std::forward<Predicate>(predicate));
  }

 private:
  const ::pid_t process_ = ::getpid();
  std::unique_ptr<std::condition_variable> variable_ = std::make_unique<std::condition_variable>();
};

}  // namespace clusterfusion
