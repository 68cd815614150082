#include "cli/interrupt.hpp"

#include <atomic>
#include <csignal>

namespace clusterfusion::cli {
namespace {

constexpr int kSignals[] = {SIGINT, SIGTERM};

std::atomic<int> noted_signal{0};
static_assert(std::atomic<int>::is_always_lock_free, "used in a signal handler");
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
void handle_signal(int number) {
  noted_signal.store(number);
  if (Generation* generation = current_generation.load()) generation->cancel();
  restore_default_handlers();
}

}  // namespace

InterruptScope::InterruptScope(Generation* generation) {
  noted_signal.store(0);
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

bool InterruptScope::interrupted() const noexcept { return signal_noted(); }

bool signal_noted() noexcept { return noted_signal.load() != 0; }

ExitCode exit_code_of_signal() noexcept {
  const int number = noted_signal.load();
  return number == SIGINT ? kInterrupted : number == SIGTERM ? kTerminated : kDone;
}

}  // namespace clusterfusion::cli
