#include "base/thread_pool.hpp"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>
#include <utility>

namespace clusterfusion {
namespace {

// How long a waiting thread spins before it sleeps. Waking a sleeper costs tens of microseconds,
// so this covers the serial work between two regions and no more.
constexpr std::chrono::microseconds kSpinTime{50};

// Parts of ThreadPool::state_.
constexpr std::uint32_t kOpen = 1u << 16;
constexpr std::uint32_t kInside = kOpen - 1;
constexpr std::uint32_t kNextRegion = kOpen << 1;

inline void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns when `value` is no longer `old`.
template <typename T>
void wait_while_equal(const std::atomic<T>& value, T old) noexcept {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int spin = 0; spin < 64; ++spin) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() - start < kSpinTime);
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// CPU quota of the cgroup in cores, or a huge number without one.
double cgroup_quota() {
  constexpr double kUnlimited = 1e9;
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return kUnlimited;
  return std::strtod(quota.c_str(), nullptr) / period;
}

}  // namespace

int usable_cores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  return std::max(1, static_cast<int>(std::min<double>(cores, std::ceil(cgroup_quota()))));
}

ThreadPool::ThreadPool(int threads) {
  workers_.reserve(static_cast<std::size_t>(std::max(0, threads - 1)));
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  state_.fetch_add(kNextRegion, std::memory_order_release);
  state_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(std::int64_t tasks, Call call, void* context) {
  call_ = call;
  context_ = context;
  tasks_ = tasks;
  next_task_.store(0, std::memory_order_relaxed);
  const bool alone = workers_.empty() || tasks <= 1;
  if (!alone) {
    // Nobody is inside: the run before has waited for that.
    const std::uint32_t number = state_.load(std::memory_order_relaxed) & ~(kOpen | kInside);
    state_.store((number + kNextRegion) | kOpen, std::memory_order_release);
    state_.notify_all();
  }
  take_tasks(0);
  if (!alone) {
    std::uint32_t state = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    while ((state & kInside) != 0) {
      wait_while_equal(state_, state);
      state = state_.load(std::memory_order_acquire);
    }
  }
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::take_tasks(int thread) noexcept {
  for (;;) {
    const std::int64_t task = next_task_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    if (thread == 0 && stop_request_ && stop_request_()) {
      next_task_.store(tasks_, std::memory_order_relaxed);
      fail_with(-1, std::make_exception_ptr(Stopped{}));
      return;
    }
    try {
      call_(context_, task, thread);
    } catch (...) {
      fail_with(task, std::current_exception());
    }
  }
}

// The error of the first task counts, whichever came first: it is the same in every run.
void ThreadPool::fail_with(std::int64_t task, std::exception_ptr error) noexcept {
  const std::lock_guard lock(error_mutex_);
  if (error_ != nullptr && failed_task_ <= task) return;
  error_ = std::move(error);
  failed_task_ = task;
}

void ThreadPool::work(int thread) noexcept {
  std::uint32_t state = 0;
  for (;;) {
    wait_while_equal(state_, state);
    state = state_.load(std::memory_order_acquire);
    for (;;) {
      // Also after an entry that failed: what changed may have been the last thing that changes.
      if (stop_.load(std::memory_order_relaxed)) return;
      if ((state & kOpen) == 0) break;
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) continue;
      take_tasks(thread);
      state = state_.fetch_sub(1, std::memory_order_acq_rel) - 1;
      if ((state & (kOpen | kInside)) == 0) state_.notify_all();  // the caller may sleep
      break;
    }
  }
}

}  // namespace clusterfusion
