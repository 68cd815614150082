#include "base/thread_pool.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

namespace clusterfusion::test {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (const std::int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
      std::atomic<bool> thread_in_range = true;
      pool.run(tasks, [&](std::int64_t task, int thread) {
        runs[static_cast<std::size_t>(task)].fetch_add(1);
        if (thread < 0 || thread >= threads) thread_in_range = false;
      });
      EXPECT_TRUE(thread_in_range);
      for (const auto& count : runs) ASSERT_EQ(count.load(), 1);
    }
  }
}

// What a region wrote is there after it, and in the next one, without any further synchronisation.
TEST(ThreadPool, RegionsSeeWhatEarlierOnesWrote) {
  ThreadPool pool(4);
  std::vector<int> values(64, 0);
  for (int round = 0; round < 2000; ++round) {
    pool.run(64, [&](std::int64_t task, int) {
      const auto i = static_cast<std::size_t>(task);
      ASSERT_EQ(values[i], round);
      values[i] = round + 1;
    });
    for (const int v : values) ASSERT_EQ(v, round + 1);
  }
}

TEST(ThreadPool, WakesSleepers) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than workers spin
    std::atomic<int> runs = 0;
    pool.run(16, [&](std::int64_t, int) { ++runs; });
    EXPECT_EQ(runs.load(), 16);
  }
}

TEST(ThreadPool, WaitsForSlowTasks) {
  ThreadPool pool(2);
  std::atomic<int> runs = 0;
  pool.run(2, [&](std::int64_t, int) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    ++runs;
  });
  EXPECT_EQ(runs.load(), 2);
}

TEST(ThreadPool, ThrowsATasksException) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 3; ++round) {
      std::atomic<int> runs = 0;
      EXPECT_THROW(pool.run(50,
                            [&](std::int64_t task, int) {
                              ++runs;
                              if (task % 10 == 3) throw std::runtime_error("task");
                            }),
                   std::runtime_error);
      EXPECT_EQ(runs.load(), 50);
      pool.run(10, [&](std::int64_t, int) { ++runs; });
      EXPECT_EQ(runs.load(), 60);
    }
  }
}

TEST(ThreadPool, UsableCoresIsPositive) { EXPECT_GE(usable_cores(), 1); }

}  // namespace
}  // namespace clusterfusion::test
