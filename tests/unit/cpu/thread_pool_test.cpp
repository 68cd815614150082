#include "base/thread_pool.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
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

TEST(ThreadPool, ThrowsTheFirstTasksExceptionThoughOthersCameBefore) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    try {
      pool.run(20, [](std::int64_t task, int) {
        if (task < 3) return;
        if (task == 3) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        throw std::runtime_error(std::to_string(task));
      });
      FAIL();
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "3");
    }
  }
}

TEST(ThreadPool, StopsOnRequest) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    std::atomic<int> runs = 0;
    const auto caller = std::this_thread::get_id();
    pool.set_stop_request([&] {
      EXPECT_EQ(std::this_thread::get_id(), caller);
      return runs.load() >= 10;
    });
    const auto count = [&](std::int64_t, int) { ++runs; };
    EXPECT_THROW(pool.run(1'000'000'000, count), Stopped);
    EXPECT_GE(runs.load(), 10);
    EXPECT_THROW(pool.run(1'000'000'000, count), Stopped) << "and again";
    pool.set_stop_request({});
    runs = 0;
    pool.run(50, count);
    EXPECT_EQ(runs.load(), 50);
  }
}

// A worker that was about to enter a region when it closed, and the pool went, must not sleep on
// what it found then. Pools side by side keep workers from getting a core in time.
TEST(ThreadPool, EndsWhileWorkersComeTooLate) {
  std::vector<std::thread> owners;
  std::atomic<int> ran = 0;
  constexpr int kOwners = 4, kPools = 1000, kTasks = 3;
  for (int i = 0; i < kOwners; ++i) {
    owners.emplace_back([&] {
      for (int round = 0; round < kPools; ++round) {
        ThreadPool pool(6);
        pool.run(kTasks, [&](std::int64_t, int) { ++ran; });
      }
    });
  }
  for (std::thread& owner : owners) owner.join();
  EXPECT_EQ(ran, kOwners * kPools * kTasks);
}

TEST(ThreadPool, UsableCoresIsPositive) { EXPECT_GE(usable_cores(), 1); }

}  // namespace
}  // namespace clusterfusion::test
