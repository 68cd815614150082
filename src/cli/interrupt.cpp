#include "cli/interrupt.hpp"

#include <atomic>
#include <csignal>

namespace clusterfusion::cli {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM};

std::atomic<bool> interrupted_flag{false};
std::atomic<Generation*> current_generation{nullptr};
static_assert(std::atomic<Generation*>::is_always_lock_free, "used in a signal handler");

void restore_default_handlers() {
  for (int number : kSignals) {
    struct sigaction now {};
    sigaction(number, nullptr, &now);
    if (now.sa_handler != SIG_IGN) std::signal(number, SIG_DFL);
  }
}

// Async-signal-safe: atomics, sigaction() and Generation::cancel(), which promises it.
void handle_signal(int) {
  interrupted_flag.store(true);
  if (Generation* generation = current_generation.load()) generation->cancel();
  restore_default_handlers();
}

}  // namespace

InterruptScope::InterruptScope(Generation* generation) {
  interrupted_flag.store(false);
  current_generation.store(generation);
  for (int number : kSignals) {
    struct sigaction action {};
    sigaction(number, nullptr, &action);
    if (action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = handle_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(number, &action, nullptr);
  }
}

InterruptScope::~InterruptScope() {
  restore_default_handlers();
  current_generation.store(nullptr);
}

bool InterruptScope::interrupted() const noexcept { return interrupted_flag.load(); }

}  // namespace clusterfusion::cli
