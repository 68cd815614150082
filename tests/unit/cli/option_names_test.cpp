#include "cli/option_names.hpp"

#include <gtest/gtest.h>

namespace clusterfusion::cli {
namespace {

TEST(OptionNames, StandForTheLibrarysFields) {
  EXPECT_EQ(with_option_names("prompt_tokens[0] is 9, expected fewer than top_k"),
            "--prompt-tokens[0] is 9, expected fewer than --top-k");
  EXPECT_EQ(with_option_names("max_positions must be in [1, 8] (max_position_embeddings)"),
            "--context must be in [1, 8] (max_position_embeddings)");
  EXPECT_EQ(with_option_names("context must be in [2, 8]; the context"),
            "--context must be in [2, 8]; the context");
}

TEST(OptionNames, LeaveQuotedWordsPathsAndOtherWordsAlone) {
  for (const char* message :
       {"generation_config.json: \"top_k\" must be", "cannot open /tmp/top_k/prompt_tokens",
        "contexts are", "my_top_k and top_keys", "a stride of 3", ""}) {
    EXPECT_EQ(with_option_names(message), message);
  }
}

}  // namespace
}  // namespace clusterfusion::cli
