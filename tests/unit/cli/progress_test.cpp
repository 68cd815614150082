#include "cli/progress.hpp"

#include <gtest/gtest.h>

namespace clusterfusion::cli {
namespace {

TEST(ProgressLine, ShowsBarShareCountAndTimeLeft) {
  EXPECT_EQ(progress_line("bench", 1, 4, "runs", 2.0, 80),
            "bench [#######                       ]  25 %  1/4 runs, 6.00 s left");
  EXPECT_EQ(progress_line("bench", 4, 4, "runs", 8.0, 80),
            "bench [##############################] 100 %  4/4 runs");
}

TEST(ProgressLine, KnowsNoTimeLeftBeforeTheFirstStep) {
  EXPECT_EQ(progress_line("bench", 0, 4, "runs", 2.0, 80),
            "bench [                              ]   0 %  0/4 runs");
  EXPECT_EQ(progress_line("bench", 0, 0, "runs", 2.0, 80),
            "bench [                              ]   0 %  0/0 runs");
}

TEST(ProgressLine, FitsTheTerminal) {
  for (int columns = 0; columns < 120; ++columns) {
    const std::string line = progress_line("perplexity", 500, 1000, "tokens", 3.0, columns);
    EXPECT_LE(static_cast<int>(line.size()), columns > 0 ? columns - 1 : 0) << columns;
  }
  EXPECT_EQ(progress_line("perplexity", 500, 1000, "tokens", 3.0, 40),
            "perplexity  50 %  500/1000 tokens, 3.00");
}

}  // namespace
}  // namespace clusterfusion::cli
