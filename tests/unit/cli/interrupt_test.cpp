#include "cli/interrupt.hpp"

#include <gtest/gtest.h>

#include <csignal>

namespace clusterfusion::cli {
namespace {

class CountingGeneration : public Generation {
 public:
  std::optional<GenerateEvent> next() override { return std::nullopt; }
  std::vector<GenerateEvent> take() override { return {}; }
  bool has_ended() const noexcept override { return true; }
  void cancel() noexcept override { ++cancels; }
  const std::vector<GenerateResult>& results() const noexcept override { return results_; }
  int cancels = 0;

 private:
  std::vector<GenerateResult> results_;
};

using Handler = void (*)(int);

Handler handler_of(int number) {
  struct sigaction action {};
  sigaction(number, nullptr, &action);
  return action.sa_handler;
}

TEST(InterruptScope, TheFirstSignalCancelsAndTheSecondIsLeftToTheSystem) {
  for (const int number : {SIGINT, SIGTERM}) {
    CountingGeneration generation;
    const InterruptScope scope(&generation);
    EXPECT_FALSE(scope.interrupted());
    std::raise(number);
    EXPECT_TRUE(scope.interrupted());
    EXPECT_EQ(generation.cancels, 1);
    EXPECT_EQ(handler_of(SIGINT), SIG_DFL);
    EXPECT_EQ(handler_of(SIGTERM), SIG_DFL);
    EXPECT_EQ(exit_code_of_signal(), 128 + number);
  }
}

TEST(InterruptScope, WorksWithoutAGeneration) {
  const InterruptScope scope;
  EXPECT_EQ(exit_code_of_signal(), kDone);
  std::raise(SIGINT);
  EXPECT_TRUE(scope.interrupted());
}

TEST(InterruptScope, EndsWithTheSystemsHandlers) {
  { const InterruptScope scope; }
  EXPECT_EQ(handler_of(SIGINT), SIG_DFL);
}

TEST(InterruptScope, LeavesIgnoredSignalsIgnored) {
  std::signal(SIGINT, SIG_IGN);
  {
    CountingGeneration generation;
    const InterruptScope scope(&generation);
    std::raise(SIGINT);
    EXPECT_FALSE(scope.interrupted());
    std::raise(SIGTERM);
    EXPECT_EQ(generation.cancels, 1);
    EXPECT_EQ(handler_of(SIGINT), SIG_IGN);
  }
  EXPECT_EQ(handler_of(SIGINT), SIG_IGN);
  std::signal(SIGINT, SIG_DFL);
}

}  // namespace
}  // namespace clusterfusion::cli
