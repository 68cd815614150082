// Which GPUs a build runs on, by the rules of the CUDA C++ Programming Guide ("Binary
// Compatibility", "Architecture-Specific Features").
#include "plan/compute_capability.hpp"

#include <gmock/gmock.h>

namespace clusterfusion::plan {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(ComputeCapability, CodeRunsOnLaterMinorNumbers) {
  for (const int minor : {0, 6, 9}) EXPECT_TRUE(runs_on("80-real", {8, minor})) << minor;
  EXPECT_TRUE(runs_on("86", {8, 6}));
  EXPECT_TRUE(runs_on("86", {8, 9}));
  EXPECT_FALSE(runs_on("86", {8, 0}));
  EXPECT_TRUE(runs_on("100-real", {10, 3}));
  EXPECT_TRUE(runs_on("120-real", {12, 1}));
}

TEST(ComputeCapability, CodeOfAnArchitectureAloneRunsNowhereElse) {
  EXPECT_TRUE(runs_on("90a-real", {9, 0}));
  EXPECT_TRUE(runs_on("120a-real", {12, 0}));
  EXPECT_FALSE(runs_on("120a-real", {12, 1}));
}

TEST(ComputeCapability, NothingRunsOnAnotherMajorNumber) {
  for (const int major : {7, 9, 10, 11, 12}) EXPECT_FALSE(runs_on("80-real", {major, 0})) << major;
  EXPECT_FALSE(runs_on("100-real", {12, 0}));
}

TEST(ComputeCapability, AnyOfSeveralWillDo) {
  for (const char* const all : {"80-real;90a-real;120-real", "80-real,90a-real,120-real"}) {
    EXPECT_TRUE(runs_on(all, {8, 9})) << all;
    EXPECT_TRUE(runs_on(all, {9, 0})) << all;
    EXPECT_TRUE(runs_on(all, {12, 0})) << all;
    EXPECT_FALSE(runs_on(all, {10, 0})) << all;
  }
}

TEST(ComputeCapability, CodeThatIsCompiledAnewDoesNotCount) {
  EXPECT_FALSE(runs_on("80-virtual", {8, 0}));
  EXPECT_FALSE(runs_on("80-virtual;90a-real", {8, 6}));
  EXPECT_FALSE(runs_on("", {9, 0}));
  EXPECT_FALSE(runs_on("native", {9, 0}));
}

TEST(ComputeCapability, SaysWhatToBuild) {
  EXPECT_EQ(no_code_because("90a-real", {9, 0}), "");
  EXPECT_EQ(no_code_because("90a-real;120-real", {8, 6}),
            "has compute capability 8.6; this build has code for 9.0, 12.0; build it with "
            "CMAKE_CUDA_ARCHITECTURES=80-real");
  EXPECT_THAT(no_code_because("80-real", {9, 0}), HasSubstr("=90a-real"));
  EXPECT_THAT(no_code_because("80-real", {10, 3}), HasSubstr("=100-real"));
  const std::string of_turing = no_code_because("80-real", {7, 5});
  EXPECT_THAT(of_turing, HasSubstr("need 8.0 or later"));
  EXPECT_THAT(of_turing, Not(HasSubstr("CMAKE_CUDA_ARCHITECTURES")));
}

TEST(ComputeCapability, WhatItNamesRuns) {
  for (const ComputeCapability device :
       {ComputeCapability{8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}, {10, 3}, {12, 0}, {12, 1}})
    EXPECT_TRUE(runs_on(architecture_for(device), device)) << device.major << '.' << device.minor;
}

}  // namespace
}  // namespace clusterfusion::plan
