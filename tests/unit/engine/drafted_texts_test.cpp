// Whatever a draft proposes, a text is bit for bit the one without: random requests with random
// drafts on a small model, in random schedules.
// CLUSTERFUSION_DRAFTED_REQUESTS says how many requests at least.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>
#include <map>

#include "engine/model_draft.hpp"
#include "engine/ngram_draft.hpp"
#include "engine/random_requests.hpp"
#include "support/random_model.hpp"
#include "support/test_drafts.hpp"

namespace clusterfusion {
namespace {

using namespace test;

int num_requests() {
  const char* const count = std::getenv("CLUSTERFUSION_DRAFTED_REQUESTS");
  return count == nullptr ? 2000 : std::atoi(count);
}

// A draft with another vocabulary, or context.
std::unique_ptr<Draft> other_model_draft(std::int64_t vocab_size, std::int64_t positions) {
  ModelConfig config = schedule_model()->config();
  config.vocab_size = vocab_size;
  config.eos_tokens = {};
  config.num_layers = 1;
  BackendOptions options;
  options.max_positions = positions;
  const auto model = make_random_model(config);
  return make_model_draft(model, schedule_backend(model, options), kVocabSize);
}

std::unique_ptr<Draft> same_model_draft(std::int64_t positions) {
  BackendOptions options;
  options.max_positions = positions;
  return make_model_draft(schedule_model(), schedule_backend(schedule_model(), options),
                          kVocabSize);
}

struct NamedDraft {
  std::string name;
  std::unique_ptr<Draft> draft;
};

// `calls` have been run alone, so that a draft may know how they end.
NamedDraft random_draft(Random& random, std::span<const Call> calls) {
  const int kind = random.below(9);
  switch (kind) {
    case 0: return {"ngram", std::make_unique<NgramDraft>()};
    case 1: return {"the model itself", same_model_draft(kLongestSchedule)};
    case 2: return {"the model itself, shorter", same_model_draft(40)};
    case 3: return {"fewer tokens", other_model_draft(300, 0)};
    case 4: return {"more tokens", other_model_draft(400, 0)};
    case 5: return {"a liar", std::make_unique<LyingDraft>(random.below(1000))};
    default: break;
  }
  const double share = kind == 6 ? 0 : kind == 7 ? 1 : 0.1 * random.between(1, 9);
  auto draft = std::make_unique<KnowingDraft>(share, kVocabSize, random.below(1000));
  for (const Call& call : calls) {
    for (const GenerateResult& result : call.results) {
      std::vector<TokenId> text = result.prompt_tokens;
      text.insert(text.end(), result.tokens.begin(), result.tokens.end());
      draft->tell(std::move(text));
    }
  }
  return {"one that knows " + std::to_string(share), std::move(draft)};
}

std::vector<Call> random_calls(Random& random, int longest) {
  std::vector<Call> calls(static_cast<std::size_t>(random.between(1, 6)));
  for (Call& call : calls) {
    call = random_call(random, longest);
    if (call.requests.size() > 6) call.requests.resize(6);
  }
  return calls;
}

// The results of each request alone, in the order of a call's.
void run_alone(Engine& plain, Call& call) {
  Call alone = call;
  alone.cancel_after = -1;
  alone.delay_us = 0;
  run(plain, alone);
  call.results = std::move(alone.results);
}

// Engines that compute one text at a time without a draft, by their longest context.
class PlainEngines {
 public:
  Engine& of(std::int64_t positions) {
    std::unique_ptr<Engine>& engine = engines_[positions];
    if (!engine)
      engine = schedule_engine(1000, {.max_sequences = 1, .prefix_cache = false}, positions);
    return *engine;
  }

 private:
  std::map<std::int64_t, std::unique_ptr<Engine>> engines_;
};

TEST(DraftedTexts, AreTheTextsWithout) {
  PlainEngines plain;
  std::int64_t requests = 0;
  std::map<std::string, std::array<std::int64_t, 2>> proposals;  // and accepted, by kind of draft
  for (unsigned round = 0; requests < num_requests(); ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    Random random(round + 7000);
    const std::int64_t positions = random.one_in(4) ? 130 : kLongestSchedule;
    const int longest = positions == 130 ? 100 : random.one_in(2) ? 150 : 800;
    std::vector<Call> calls = random_calls(random, longest);
    for (Call& call : calls) run_alone(plain.of(positions), call);
    NamedDraft draft = random_draft(random, calls);
    SCOPED_TRACE(draft.name);
    SchedulerOptions scheduling;
    if (random.one_in(3)) scheduling.max_sequences = random.between(1, 4);
    scheduling.prefix_cache = !random.one_in(4);
    scheduling.draft = std::move(draft.draft);
    scheduling.draft_tokens = random.between(1, 15);
    scheduling.draft_adapts = random.one_in(3);
    const std::int64_t pages = longest == 800 ? random.between(20, 400) : random.between(6, 40);
    const auto engine = schedule_engine(pages, std::move(scheduling), positions);
    std::vector<Call> drafted = calls;
    run_together(*engine, drafted);
    for (std::size_t i = 0; i < calls.size(); ++i) {
      ASSERT_EQ(drafted[i].results.size(), calls[i].results.size());
      for (std::size_t r = 0; r < calls[i].results.size(); ++r) {
        SCOPED_TRACE(testing::Message() << "call " << i << ", result " << r);
        expect_same(drafted[i].results[r], calls[i].results[r]);
        const Statistics& statistics = drafted[i].results[r].statistics;
        EXPECT_LE(statistics.draft_accepted, statistics.draft_proposed);
        EXPECT_LE(statistics.draft_steps, statistics.decode_steps);
        auto& [proposed, accepted] = proposals[draft.name.substr(0, 14)];
        proposed += statistics.draft_proposed;
        accepted += statistics.draft_accepted;
        ++requests;
      }
    }
    expect_idle(*engine);
    if (HasFatalFailure() || HasNonfatalFailure()) return;
  }
  std::cout << requests << " requests\n";
  for (const auto& [name, counts] : proposals) {
    std::cout << name << ": " << counts[0] << " proposed, " << counts[1] << " accepted\n";
  }
  if (num_requests() < 1000) return;
  EXPECT_EQ(proposals["the model itse"][0] > 0, true);
  EXPECT_GT(proposals["ngram"][1], 0);
}

// A request of which all is known beforehand.
class OneText : public testing::Test {
 protected:
  static GenerateRequest request(std::int64_t max_new_tokens) {
    GenerateRequest request;
    request.prompt_tokens = {5, 6, 7};
    request.max_new_tokens = max_new_tokens;
    request.sampling = {.temperature = 0.9f, .seed = 3, .num_logprobs = 1};
    request.ignore_eos = true;
    return request;
  }
  static GenerateResult alone(const GenerateRequest& request) {
    return schedule_engine(100, {})->generate(request);
  }
  static GenerateResult with(std::unique_ptr<Draft> draft, const GenerateRequest& request) {
    const auto engine =
        schedule_engine(100, {.draft = std::move(draft), .draft_tokens = 7, .draft_adapts = false});
    return engine->generate(request);
  }
  static std::unique_ptr<KnowingDraft> knowing(const GenerateRequest& request, double share) {
    const GenerateResult result = alone(request);
    auto draft = std::make_unique<KnowingDraft>(share, kVocabSize, 1);
    std::vector<TokenId> text = result.prompt_tokens;
    text.insert(text.end(), result.tokens.begin(), result.tokens.end());
    text.insert(text.end(), 20, 1);  // behind the end: never reached
    draft->tell(std::move(text));
    return draft;
  }
};

TEST_F(OneText, TakesAStepForEightTokensOfADraftThatIsRight) {
  const GenerateRequest request = OneText::request(65);
  const GenerateResult result = with(knowing(request, 1), request);
  expect_same(result, alone(request));
  // The first token comes with the prompt.
  EXPECT_EQ(result.statistics.decode_steps, 8);
  EXPECT_EQ(result.statistics.draft_steps, 8);
  EXPECT_EQ(result.statistics.draft_proposed, 56);
  EXPECT_EQ(result.statistics.draft_accepted, 56);
  EXPECT_EQ(result.statistics.mean_accepted, 7);
}

TEST_F(OneText, TakesAStepForEachTokenOfADraftThatIsWrong) {
  const GenerateRequest request = OneText::request(30);
  const GenerateResult result = with(knowing(request, 0), request);
  expect_same(result, alone(request));
  EXPECT_EQ(result.statistics.decode_steps, 29);
  EXPECT_EQ(result.statistics.draft_accepted, 0);
  EXPECT_EQ(result.statistics.mean_accepted, 0);
}

TEST_F(OneText, EndsInTheMiddleOfARun) {
  const GenerateRequest whole = request(64);
  const std::vector<TokenId> tokens = alone(whole).tokens;
  for (std::size_t at = 1; at < 20; ++at) {
    GenerateRequest request = whole;
    request.stop_tokens = {tokens[at]};
    expect_same(with(knowing(whole, 1), request), alone(request));
    request.stop_tokens.clear();
    request.max_new_tokens = static_cast<std::int64_t>(at);
    expect_same(with(knowing(whole, 1), request), alone(request));
    request = whole;
    const std::string text = byte_tokenizer()->decode(std::span(tokens).subspan(at, 3));
    if (text.empty() || text.find("\xEF\xBF\xBD") != std::string::npos) continue;
    request.stop_strings = {text};
    expect_same(with(knowing(whole, 1), request), alone(request));
  }
}

// Where a device decodes with other last bits than it prefills, a draft may rarely choose
// otherwise behind tokens that it has read.
void expect_always_right(const Statistics& statistics) {
  static const bool same_bits = schedule_backend(schedule_model(), {})->info().decodes_as_prefills;
  const std::int64_t wrong = statistics.draft_proposed - statistics.draft_accepted;
  EXPECT_LE(wrong, same_bits ? 0 : 6 + statistics.draft_proposed / 20);
}

// Its own noise makes a draft of the same weights right each time.
TEST_F(OneText, ADraftOfTheSameModelIsAlwaysRight) {
  const GenerateRequest request = OneText::request(100);
  const GenerateResult result = with(same_model_draft(0), request);
  expect_same(result, alone(request));
  EXPECT_GT(result.statistics.draft_proposed, 80);
  expect_always_right(result.statistics);
}

// With every option.
TEST_F(OneText, ADraftOfTheSameModelIsAlwaysRightInRandomRequests) {
  const auto engine = schedule_engine(400, {.max_sequences = 1,
                                            .prefix_cache = false,
                                            .draft = same_model_draft(0),
                                            .draft_tokens = 5,
                                            .draft_adapts = false});
  Random random(5);
  std::int64_t accepted = 0;
  for (int i = 0; i < 100; ++i) {
    GenerateRequest request = random_request(random, 70);
    request.n = 1;
    const Statistics statistics = engine->generate(request).statistics;
    SCOPED_TRACE(i);
    expect_always_right(statistics);
    accepted += statistics.draft_accepted;
  }
  EXPECT_GT(accepted, 500);
}

TEST_F(OneText, ADraftOfAShorterContextFallsSilent) {
  const GenerateRequest request = OneText::request(100);
  const GenerateResult result = with(same_model_draft(50), request);
  expect_same(result, alone(request));
  EXPECT_GT(result.statistics.draft_accepted, 30);
  EXPECT_LT(result.statistics.draft_accepted, 50);
}

TEST_F(OneText, ADeviceWithoutRowsUsesNoDraft) {
  const FakeEngine fake =
      fake_engine(hashed_logits(), {}, 100, {}, {.draft = std::make_unique<NgramDraft>()});
  ASSERT_EQ(fake.engine->warnings().size(), 1u);
  EXPECT_THAT(fake.engine->warnings()[0],
              testing::AllOf(testing::HasSubstr("the draft ngram is not used"),
                             testing::HasSubstr("mode \"throughput\"")));
  EXPECT_EQ(fake.engine->generate(one_token_request(20)).statistics.draft_steps, 0);
}

// Nobody is preempted for proposals.
TEST_F(OneText, ProposalsTakeNoMemoryFromOthers) {
  std::vector<GenerateRequest> requests;
  for (int i = 0; i < 4; ++i) {
    requests.push_back(request(60));
    requests.back().prompt_tokens = {5 + i, 6, 7};
  }
  // Each needs one page, and there is none besides.
  const auto engine = schedule_engine(4, {.prefix_cache = false,
                                          .draft = same_model_draft(0),
                                          .draft_tokens = 15,
                                          .draft_adapts = false});
  const auto results = engine->generate(requests);
  for (std::size_t i = 0; i < results.size(); ++i) expect_same(results[i], alone(requests[i]));
  EXPECT_EQ(engine->serving_statistics().preemptions, 0);
}

}  // namespace
}  // namespace clusterfusion
