#include "cli/report_format.hpp"

#include <gtest/gtest.h>

namespace clusterfusion::cli {
namespace {

TEST(FormatDuration, HasThreeDigitsAndAUnit) {
  EXPECT_EQ(format_duration(0), "0.00 us");
  EXPECT_EQ(format_duration(12.34e-6), "12.3 us");
  EXPECT_EQ(format_duration(999.6e-6), "1.00 ms");
  EXPECT_EQ(format_duration(35.1e-3), "35.1 ms");
  EXPECT_EQ(format_duration(0.9996), "1.00 s");
  EXPECT_EQ(format_duration(9.996), "10.0 s");
  EXPECT_EQ(format_duration(1.53), "1.53 s");
  EXPECT_EQ(format_duration(99.96), "1 min 40 s");
  EXPECT_EQ(format_duration(125), "2 min 5 s");
  EXPECT_EQ(format_duration(3720), "1 h 2 min");
}

TEST(FormatBytes, UsesDecimalUnits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(999), "999 B");
  EXPECT_EQ(format_bytes(1000), "1.00 kB");
  EXPECT_EQ(format_bytes(999.6e3), "1.00 MB");
  EXPECT_EQ(format_bytes(14.94e6), "14.9 MB");
  EXPECT_EQ(format_bytes(5.55e9), "5.55 GB");
  EXPECT_EQ(format_bytes(3.35e12), "3.35 TB");
}

TEST(FormatCount, GroupsDigitsAndKnowsThePlural) {
  EXPECT_EQ(format_count(0, "token"), "0 tokens");
  EXPECT_EQ(format_count(1, "token"), "1 token");
  EXPECT_EQ(format_count(999, "token"), "999 tokens");
  EXPECT_EQ(format_count(1024, "token"), "1,024 tokens");
  EXPECT_EQ(format_count(2775208960, "parameter"), "2,775,208,960 parameters");
}

TEST(FormatDevice, SaysWhichAndWhy) {
  EngineInfo info;
  info.device = "cpu";
  info.device_description = "Some processor, 2 threads";
  info.device_reason = "no NVIDIA GPU found";
  EXPECT_EQ(format_device(info), "cpu, Some processor, 2 threads (no NVIDIA GPU found)");
}

TEST(FormatStatistics, SaysWhatWasMeasured) {
  Statistics statistics;
  statistics.prompt_tokens = 12;
  statistics.new_tokens = 128;
  statistics.time_to_first_token_seconds = 0.0351;
  statistics.seconds_per_token = 0.012;
  statistics.tokens_per_second = 83.33;
  statistics.bytes_per_second = 9.8e9;
  EXPECT_EQ(format_statistics(statistics, "token_limit"),
            "prompt: 12 tokens, first token after 35.1 ms\n"
            "output: 128 tokens (token_limit), 12.0 ms/token, 83.3 tokens/s, 9.80 GB/s\n");
  statistics.read_ceiling_bytes_per_second = 11.2e9;
  statistics.ceiling_share = 0.875;
  EXPECT_EQ(format_statistics(statistics, "cancelled"),
            "prompt: 12 tokens, first token after 35.1 ms\n"
            "output: 128 tokens (cancelled), 12.0 ms/token, 83.3 tokens/s, 9.80 GB/s, 88 % of the "
            "read ceiling of 11.2 GB/s\n");
}

TEST(FormatStatistics, LeavesOutWhatIsUndefined) {
  Statistics statistics;
  statistics.prompt_tokens = 1;
  EXPECT_EQ(format_statistics(statistics, "cancelled"),
            "prompt: 1 token\noutput: 0 tokens (cancelled)\n");
  statistics.new_tokens = 1;
  statistics.time_to_first_token_seconds = 2;
  EXPECT_EQ(format_statistics(statistics, "stop_token"),
            "prompt: 1 token, first token after 2.00 s\noutput: 1 token (stop_token)\n");
}

}  // namespace
}  // namespace clusterfusion::cli
