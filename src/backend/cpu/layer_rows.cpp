#include "backend/cpu/layer_rows.hpp"

#include <mutex>

#include "base/thread_pool.hpp"

namespace clusterfusion::cpu {

void run_tasks(std::int64_t count, const std::function<void(std::int64_t)>& task) {
  struct Team {
    ThreadPool threads{usable_cores()};
    std::mutex mutex;
  };
  // Never destroyed: in a forked process there would be no threads to wait for.
  static Team& team = *new Team;
  if (std::unique_lock lock(team.mutex, std::try_to_lock); lock && count > 1) {
    return team.threads.run(count, [&](std::int64_t i, int) { task(i); });
  }
  for (std::int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace clusterfusion::cpu
