#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "clusterfusion/error.hpp"
#include "clusterfusion/sampling.hpp"
#include "special_values.hpp"

namespace clusterfusion {
namespace {

struct BadValue {
  std::string name;
  std::function<void(SamplingParams&)> set;
  std::string message;
};

class ImpossibleParams : public testing::TestWithParam<BadValue> {};

TEST_P(ImpossibleParams, NamesOptionRangeAndValue) {
  SamplingParams params;
  GetParam().set(params);
  try {
    params.validate();
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    EXPECT_EQ(error.what(), GetParam().message);
  }
}

const std::string kTemperature = "temperature must be a finite number >= 0 (0 is greedy), got ";
const std::string kTopK = "top_k must be >= 0 (0 keeps all tokens), got ";
const std::string kTopP = "top_p must be in (0, 1] (1 keeps all tokens), got ";
const std::string kMinP = "min_p must be in [0, 1] (0 keeps all tokens), got ";
const std::string kPenalty =
    "repetition_penalty must be a finite number > 0 (1 is no penalty), got ";
const std::string kLogprobs =
    "num_logprobs must be in [-1, 100] (-1: none, 0: of the chosen token only), got ";

INSTANTIATE_TEST_SUITE_P(
    All, ImpossibleParams,
    testing::Values(
        BadValue{"temperature_negative", [](auto& p) { p.temperature = -0.5f; },
                 kTemperature + "-0.5"},
        BadValue{"temperature_nan", [](auto& p) { p.temperature = kNan; }, kTemperature + "nan"},
        BadValue{"temperature_inf", [](auto& p) { p.temperature = kInf; }, kTemperature + "inf"},
        BadValue{"top_k_negative", [](auto& p) { p.top_k = -1; }, kTopK + "-1"},
        BadValue{"top_p_zero", [](auto& p) { p.top_p = 0; }, kTopP + "0"},
        BadValue{"top_p_above", [](auto& p) { p.top_p = 1.5f; }, kTopP + "1.5"},
        BadValue{"top_p_nan", [](auto& p) { p.top_p = kNan; }, kTopP + "nan"},
        BadValue{"min_p_negative", [](auto& p) { p.min_p = -0.25f; }, kMinP + "-0.25"},
        BadValue{"min_p_above", [](auto& p) { p.min_p = 2; }, kMinP + "2"},
        BadValue{"min_p_nan", [](auto& p) { p.min_p = kNan; }, kMinP + "nan"},
        BadValue{"penalty_zero", [](auto& p) { p.repetition_penalty = 0; }, kPenalty + "0"},
        BadValue{"penalty_negative", [](auto& p) { p.repetition_penalty = -1; }, kPenalty + "-1"},
        BadValue{"penalty_nan", [](auto& p) { p.repetition_penalty = kNan; }, kPenalty + "nan"},
        BadValue{"penalty_inf", [](auto& p) { p.repetition_penalty = kInf; }, kPenalty + "inf"},
        BadValue{"logprobs_below", [](auto& p) { p.num_logprobs = -2; }, kLogprobs + "-2"},
        BadValue{"logprobs_above", [](auto& p) { p.num_logprobs = 101; }, kLogprobs + "101"}),
    [](const auto& info) { return info.param.name; });

TEST(SamplingParams, AcceptsTheEndsOfEveryRange) {
  EXPECT_NO_THROW(SamplingParams{}.validate());
  EXPECT_NO_THROW((SamplingParams{.temperature = 1e6f,
                                  .top_k = std::numeric_limits<std::int32_t>::max(),
                                  .top_p = std::numeric_limits<float>::denorm_min(),
                                  .min_p = 1,
                                  .repetition_penalty = std::numeric_limits<float>::max(),
                                  .seed = ~0ull,
                                  .num_logprobs = 100})
                      .validate());
}

}  // namespace
}  // namespace clusterfusion
