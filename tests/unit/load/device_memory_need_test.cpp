#include "backend/load/device_memory_need.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "clusterfusion/error.hpp"

namespace clusterfusion {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr std::int64_t kGb = 1'000'000'000;

// 5 GB of weights, 0.3 of workspace, 32 pages of 20 MB: 5.94 GB.
DeviceMemoryNeed need() {
  return {.weight_bytes = 5 * kGb,
          .workspace_bytes = 300'000'000,
          .kv_page_bytes = 20'000'000,
          .positions = 2048};
}

std::string message(std::int64_t free, std::int64_t total, const DeviceMemoryNeed& asked = need()) {
  try {
    require_fit(asked, free, total);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::out_of_memory);
    return error.what();
  }
  return "fits";
}

TEST(DeviceMemoryNeed, FitsExactly) {
  EXPECT_EQ(message(5'940'000'000, 8 * kGb), "fits");
  EXPECT_NE(message(5'939'999'999, 8 * kGb), "fits");
}

TEST(DeviceMemoryNeed, CountsWholePages) {
  DeviceMemoryNeed one_more = need();
  ++one_more.positions;
  EXPECT_THAT(message(5'940'000'000, 8 * kGb, one_more),
              HasSubstr("0.66 GB of KV cache for one sequence of 2049 positions make 5.96 GB"));
  EXPECT_EQ(message(5'960'000'000, 8 * kGb, one_more), "fits");
}

TEST(DeviceMemoryNeed, SaysAllNumbersAndTheWaysOut) {
  EXPECT_EQ(
      message(5'500'000'000, 8 * kGb),
      "the model does not fit into the GPU's memory: 5.00 GB of weights, 0.30 GB of workspace "
      "and 0.64 GB of KV cache for one sequence of 2048 positions make 5.94 GB, and 5.50 of "
      "8.00 GB are free; ask for a context of at most 640 positions, close other programs on "
      "this GPU, take a smaller model, or use device \"cpu\"");
}

TEST(DeviceMemoryNeed, AdvisesOnlyWhatCanHelp) {
  const std::string no_context_helps = message(5'319'999'999, 8 * kGb);
  EXPECT_THAT(no_context_helps, Not(HasSubstr("ask for a context")));
  EXPECT_THAT(no_context_helps, HasSubstr("close other programs"));
  const std::string shortest_context_helps = message(5'320'000'000, 5'939'999'999);
  EXPECT_THAT(shortest_context_helps, HasSubstr("a context of at most 64 positions"));
  EXPECT_THAT(shortest_context_helps, Not(HasSubstr("close other programs")));
}

}  // namespace
}  // namespace clusterfusion
