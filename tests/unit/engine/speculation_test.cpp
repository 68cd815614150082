// How many tokens are proposed, on a device and with drafts whose times and luck a test writes.
#include "engine/speculation.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/fixtures.hpp"
#include "engine/step_costs.hpp"
#include "support/test_drafts.hpp"

namespace clusterfusion {
namespace {

using namespace test;

TEST(StepCosts, LieOnALineBetweenWhatIsKnown) {
  StepCosts costs;
  EXPECT_EQ(costs.seconds(1), 0);
  costs.note(2, 10);
  EXPECT_EQ(costs.seconds(1), 10);
  EXPECT_EQ(costs.seconds(2), 10);
  EXPECT_EQ(costs.seconds(4), 20) << "in proportion beyond";
  costs.note(6, 20);
  EXPECT_DOUBLE_EQ(costs.seconds(3), 12.5);
  EXPECT_EQ(costs.seconds(12), 40);
}

TEST(StepCosts, FollowTheMachine) {
  StepCosts costs;
  costs.note(1, 1);
  costs.note(8, 2);
  for (int i = 0; i < 100; ++i) costs.note(1, 3);
  EXPECT_NEAR(costs.seconds(1), 3, 0.01);
  EXPECT_NEAR(costs.seconds(8), 2 * std::sqrt(3), 0.1) << "half of it the machine's mood";
  costs.note(8, 1000);
  EXPECT_LT(costs.seconds(8), 5) << "one step that was held up";
}

// A knowing draft whose tokens take time.
class CostlyDraft final : public KnowingDraft {
 public:
  CostlyDraft(double share, double token_seconds, std::shared_ptr<FakeState> state)
      : KnowingDraft(share, kVocabSize, 11),
        token_seconds_(token_seconds),
        state_(std::move(state)) {}
  void propose(std::span<DraftQuery> queries) override {
    KnowingDraft::propose(queries);
    std::int32_t steps = 0;
    for (const DraftQuery& query : queries) steps = std::max(steps, query.most);
    state_->clock = state_->clock + steps * token_seconds_;
  }
  bool is_cheap() const override { return token_seconds_ == 0; }
  double seconds_per_token() const override { return token_seconds_; }

 private:
  double token_seconds_;
  std::shared_ptr<FakeState> state_;
};

struct Costs {
  std::string name;
  std::function<double(double rows)> step;
};

const std::vector<Costs>& device_costs() {
  static const std::vector<Costs> costs{
      {"rows_for_nothing", [](double) { return 1.0; }},
      {"like_a_gpu", [](double rows) { return 1 + 0.02 * (rows - 1); }},
      {"like_a_cpu", [](double rows) { return 0.7 + 0.3 * rows; }},
      {"rows_for_their_price", [](double rows) { return rows; }},
      {"dearer_than_steps", [](double rows) { return rows == 1 ? 1 : 1.5 * rows; }},
      {"in_stairs", [](double rows) { return rows <= 4   ? 1.0
                                             : rows <= 8 ? 1.4
                                                         : 3.0; }},
  };
  return costs;
}

// Tokens a step of `k` proposals, each right with the same chance.
double expected_tokens(double share, int k) {
  double tokens = 1, all = 1;
  for (int i = 0; i < k; ++i) tokens += all *= share;
  return tokens;
}

struct Outcome {
  double seconds = 0;  // of decoding
  Statistics statistics;
};

constexpr std::int64_t kTokens = 256;

Outcome decode(const Costs& costs, double share, double draft_seconds, std::int64_t new_tokens,
               int texts = 1) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < texts; ++i) {
    requests.push_back(one_token_request(new_tokens + 1));
    requests.back().prompt_tokens = {i};
    requests.back().ignore_eos = true;
  }
  const auto set = [&](FakeState& state) {
    state.info.max_positions = 1024;
    state.info.verify_rows = 64;
    state.info.decode_ahead = 16;
    state.verify_seconds = [&costs](std::size_t rows) {
      return costs.step(static_cast<double>(rows));
    };
    state.step_seconds = costs.step(texts);
  };
  const auto plain = fake_engine(hashed_logits(), set).engine->generate(requests);
  auto state = std::make_shared<FakeState>();
  auto draft = std::make_unique<CostlyDraft>(share, draft_seconds, state);
  for (const GenerateResult& result : plain) {
    std::vector<TokenId> text = result.prompt_tokens;
    text.insert(text.end(), result.tokens.begin(), result.tokens.end());
    text.insert(text.end(), 20, 1);
    draft->tell(std::move(text));
  }
  FakeEngine fake = fake_engine_in(state, hashed_logits(), set,
                                   {.now = [state] { return state->clock.load(); },
                                    .draft = std::move(draft),
                                    .draft_tokens = 15});
  const double start = state->clock;
  const auto results = fake.engine->generate(requests);
  Outcome outcome{state->clock - start, results[0].statistics};
  for (std::size_t i = 0; i < results.size(); ++i) EXPECT_EQ(results[i].tokens, plain[i].tokens);
  return outcome;
}

class Adaption : public testing::TestWithParam<Costs> {};

TEST_P(Adaption, NeverCostsMoreThanThreeInAHundred) {
  for (const double share : {0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0}) {
    for (const double draft : {0.0, 0.02, 0.1, 0.4, 1.0, 3.0}) {
      const Outcome outcome = decode(GetParam(), share, draft, kTokens);
      EXPECT_LE(outcome.seconds, 1.03 * kTokens * GetParam().step(1))
          << share << " right, a draft's token takes " << draft;
    }
  }
}

TEST_P(Adaption, ShortTextsDoNotPayForTheExperience) {
  for (const std::int64_t tokens : {8, 16, 64}) {
    const Outcome outcome = decode(GetParam(), 0, 0, tokens);
    EXPECT_LE(outcome.seconds, 1.03 * static_cast<double>(tokens) * GetParam().step(1)) << tokens;
  }
}

// They are not long enough to find out much, but what is gained may be staked.
TEST_P(Adaption, ShortTextsGainToo) {
  double best = GetParam().step(1);
  for (int k = 1; k <= 15; ++k) best = std::min(best, GetParam().step(k + 1) / (k + 1));
  const Outcome outcome = decode(GetParam(), 1, 0, 64);
  EXPECT_LE(outcome.seconds / 64, best + 0.5 * (GetParam().step(1) - best));
}

TEST_P(Adaption, ComesCloseToTheBestFixedNumber) {
  for (const double share : {0.7, 0.9, 1.0}) {
    for (const double draft : {0.0, 0.05}) {
      double best = GetParam().step(1);
      for (int k = 1; k <= 15; ++k) {
        best = std::min(best, (GetParam().step(k + 1) + k * draft) / expected_tokens(share, k));
      }
      const Outcome outcome = decode(GetParam(), share, draft, kTokens);
      const double a_token = outcome.seconds / kTokens;
      EXPECT_LE(a_token, 1.25 * best) << share << " right, a draft's token takes " << draft;
    }
  }
}

TEST_P(Adaption, HoldsForTextsTogether) {
  constexpr int kTexts = 6;
  for (const double share : {0.0, 0.5, 0.9}) {
    const Outcome outcome = decode(GetParam(), share, 0.05, kTokens, kTexts);
    EXPECT_LE(outcome.seconds, 1.03 * kTokens * GetParam().step(kTexts)) << share;
  }
}

INSTANTIATE_TEST_SUITE_P(Costs, Adaption, testing::ValuesIn(device_costs()),
                         [](const auto& info) { return info.param.name; });

// While there is nothing to propose, bursts of steps go on as they do without a draft.
TEST(Bursts, GrowWhileNothingIsProposed) {
  auto state = std::make_shared<FakeState>();
  const FakeEngine drafted = fake_engine_in(
      state, hashed_logits(),
      [](FakeState& s) {
        s.info.max_positions = 1024;
        s.info.verify_rows = 64;
        s.info.decode_ahead = 16;
        s.verify_seconds = [](std::size_t rows) { return 1e-4 * static_cast<double>(rows); };
        s.step_seconds = 1e-4;
      },
      {.now = [state] { return state->clock.load(); },
       .draft = std::make_unique<CostlyDraft>(0, 1.0, state)});
  GenerateRequest request = one_token_request(200);
  request.ignore_eos = true;
  drafted.engine->generate(request);
  EXPECT_EQ(*std::ranges::max_element(state->burst_steps), 16);
  EXPECT_LT(state->burst_steps.size(), 40u);
}

}  // namespace
}  // namespace clusterfusion
