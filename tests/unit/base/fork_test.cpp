// What belongs to threads of a process, in a fork of it that has none of them: it ends all the
// same.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "base/condition_variable.hpp"
#include "base/thread_pool.hpp"

namespace clusterfusion {
namespace {

// The exit status of a fork that runs `body`, or the signal that ended it; 10 seconds at most.
template <typename Body>
int status_of_fork(Body&& body) {
  const ::pid_t child = ::fork();
  if (child == 0) {
    ::alarm(10);
    body();
    ::_exit(0);
  }
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

TEST(Fork, DestroysAConditionVariableOnWhichItsParentWaits) {
  std::mutex mutex;
  auto came = std::make_unique<ConditionVariable>();
  bool waits = false, over = false;
  std::thread waiter([&] {
    std::unique_lock lock(mutex);
    came->wait(lock, [&] {
      waits = true;
      return over;
    });
  });
  // Once `waits` is seen under the mutex, the waiter is inside the wait.
  for (bool seen = false; !seen; std::this_thread::yield()) {
    const std::lock_guard lock(mutex);
    seen = waits;
  }
  EXPECT_EQ(status_of_fork([&] { came.reset(); }), 0);
  {
    const std::lock_guard lock(mutex);
    over = true;
  }
  came->notify_all();
  waiter.join();
}

TEST(Fork, DestroysAThreadPoolAndComputesWithItsOwnThread) {
  ThreadPool outer(3);
  auto pool = std::make_unique<ThreadPool>(3);
  pool->run(10, [](std::int64_t, int) {});
  const int status = status_of_fork([&] {
    std::atomic<int> sum = 0;
    outer.run(10, [&](std::int64_t task, int) { sum += static_cast<int>(task); });
    if (sum != 45) ::_exit(1);
    pool.reset();
  });
  EXPECT_EQ(status, 0);
  pool.reset();
}

}  // namespace
}  // namespace clusterfusion
