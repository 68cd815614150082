// A fixed team of threads for short parallel regions, a microsecond or two each.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/stop_request.hpp"

namespace clusterfusion {

// Cores that this process may use: the affinity mask, limited by the cgroup's CPU quota. At
// least 1.
int usable_cores();

// Threads between regions spin for a moment, then sleep: the cores are shared with others.
class ThreadPool {
 public:
  // `threads` >= 1, the calling thread included.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  // While `stop` is set (not empty), run() asks it before each task that the calling thread takes.
  // Once it is true no further task begins, and run() throws Stopped.
  void set_stop_request(StopRequest stop) { stop_request_ = std::move(stop); }

  // Calls body(task, thread) for each task in [0, tasks), thread in [0, size()), and returns when
  // all have ended. Tasks are handed out in order, one at a time, to whichever thread is free. An
  // exception of a task is thrown here after the others have ended: the first task's, if several.
  // Must not be called from a task, nor by two threads at once.
  template <typename Body>
  void run(std::int64_t tasks, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_erased(
        tasks,
        [](void* context, std::int64_t task, int thread) {
          (*static_cast<Plain*>(context))(task, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Call = void (*)(void* context, std::int64_t task, int thread);

  void run_erased(std::int64_t tasks, Call call, void* context);
  void work(int thread) noexcept;
  void take_tasks(int thread) noexcept;
  void fail_with(std::int64_t task, std::exception_ptr error) noexcept;

  // The running region. Written by the caller before it opens, read by workers inside.
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  std::mutex error_mutex_;  // for what follows, while the region is open
  std::exception_ptr error_;
  std::int64_t failed_task_ = 0;
  StopRequest stop_request_;  // the caller's alone

  alignas(64) std::atomic<std::int64_t> next_task_ = 0;
  // Number of the region, whether it is open, and how many workers are inside. A worker that comes
  // too late (on a busy machine it may not get a core for milliseconds) finds the region closed,
  // and nobody waits for it.
  alignas(64) std::atomic<std::uint32_t> state_ = 0;
  std::atomic<bool> stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace clusterfusion
