#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

// Runs a generation and checks what must hold for every one of them: events add up to results,
// and each sequence ends once.
std::vector<GenerateResult> run(Engine& engine, std::vector<GenerateRequest> requests) {
  const std::size_t count = requests.size();
  std::vector<std::string> texts(count);
  std::vector<std::vector<TokenId>> tokens(count);
  std::vector<int> endings(count);
  const std::vector<GenerateResult> results =
      engine.generate(std::move(requests), [&](const GenerateEvent& event) {
        EXPECT_EQ(endings[event.index], 0) << "an event after the last";
        texts[event.index] += event.text;
        if (event.token) tokens[event.index].push_back(event.token->token);
        endings[event.index] += event.finish_reason.has_value();
        return true;
      });
  EXPECT_EQ(results.size(), count);
  for (std::size_t i = 0; i < count; ++i) {
    EXPECT_EQ(texts[i], results[i].text);
    EXPECT_EQ(tokens[i], results[i].tokens);
    EXPECT_EQ(endings[i], 1);
    EXPECT_EQ(results[i].statistics.new_tokens, std::ssize(results[i].tokens));
  }
  return results;
}

GenerateResult run(Engine& engine, GenerateRequest request) {
  return run(engine, std::vector<GenerateRequest>{std::move(request)}).front();
}

TEST(Generate, StopsAtTheTokenLimit) {
  const FakeEngine fake = fake_engine(say("hello world"));
  const GenerateResult result = run(*fake.engine, one_token_request(5));
  EXPECT_EQ(result.text, "hello");
  EXPECT_EQ(result.tokens, bytes_to_tokens("hello"));
  EXPECT_THAT(result.prompt_tokens, ElementsAre(1 + 'p'));
  EXPECT_THAT(result.sampled, IsEmpty());
  EXPECT_EQ(result.finish_reason, FinishReason::token_limit);
  EXPECT_THAT(fake.state->reserved, testing::Contains(5));  // the last token is not fed
  EXPECT_THAT(fake.state->reserved, testing::Each(testing::Le(6)));
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Generate, StopsAtEndOfText) {
  std::vector<TokenId> script = bytes_to_tokens("bye");
  script.push_back(kEndOfText);
  const FakeEngine fake = fake_engine(say(script));
  const GenerateResult result = run(*fake.engine, one_token_request(20));
  EXPECT_EQ(result.text, "bye");
  EXPECT_EQ(result.tokens, script);
  EXPECT_EQ(result.finish_reason, FinishReason::stop_token);

  GenerateRequest request = one_token_request(6);
  request.ignore_eos = true;
  EXPECT_EQ(run(*fake.engine, request).text, "byexx");
  EXPECT_EQ(run(*fake.engine, request).finish_reason, FinishReason::token_limit);
  request.skip_special_tokens = false;
  EXPECT_EQ(run(*fake.engine, request).text, "bye<|endoftext|>xx");
}

TEST(Generate, StopsAtStopTokensWhoseTextIsLeftOut) {
  const FakeEngine fake = fake_engine(say("hello"));
  GenerateRequest request = one_token_request(4);
  request.stop_tokens = {1 + 'z', 1 + 'l'};
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, "he");
  EXPECT_EQ(result.tokens, bytes_to_tokens("hel"));
  EXPECT_EQ(result.finish_reason, FinishReason::stop_token);
}

TEST(Generate, StopsBeforeAStopStringThatSpansTokens) {
  const FakeEngine fake = fake_engine(say("one two three"));
  GenerateRequest request = one_token_request(50);
  request.stop_strings = {"missing", "two", " two", "wo"};
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, "one");
  EXPECT_EQ(result.tokens, bytes_to_tokens("one two"));
  EXPECT_EQ(result.finish_reason, FinishReason::stop_string);
}

TEST(Generate, StopsInTheMiddleOfATokensText) {
  const FakeEngine fake = fake_engine(say(std::vector<TokenId>{kThe, kEnding, kThe}));
  GenerateRequest request = one_token_request(50);
  request.stop_strings = {"END"};
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, " thethe ");
  EXPECT_THAT(result.tokens, ElementsAre(kThe, kEnding));
  EXPECT_EQ(result.finish_reason, FinishReason::stop_string);
}

TEST(Generate, ReturnsTextHeldBackWhenNoStopStringCame) {
  const FakeEngine fake = fake_engine(say("a STO"));
  GenerateRequest request = one_token_request(5);
  request.stop_strings = {"STOP"};
  EXPECT_EQ(run(*fake.engine, request).text, "a STO");
  EXPECT_EQ(run(*fake.engine, request).finish_reason, FinishReason::token_limit);
}

// "bc" is complete while "abcd" might still begin before it; the end of the text decides.
TEST(Generate, EndOfTextDecidesBetweenStopStrings) {
  const FakeEngine fake = fake_engine(say("xabcx"));
  GenerateRequest request = one_token_request(4);
  request.stop_strings = {"abcd", "bc"};
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, "xa");
  EXPECT_EQ(result.finish_reason, FinishReason::stop_string);
}

// The same where the end of the text is a token that ends it.
TEST(Generate, AStopTokenDecidesBetweenStopStrings) {
  std::vector<TokenId> script = bytes_to_tokens("xabc");
  script.push_back(kEndOfText);
  const FakeEngine fake = fake_engine(say(script));
  GenerateRequest request = one_token_request(20);
  request.stop_strings = {"abcd", "bc"};
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, "xa");
  EXPECT_EQ(result.tokens, script);
  EXPECT_EQ(result.finish_reason, FinishReason::stop_string);
}

TEST(Generate, StopsBeforeASpecialTokenThatTheTextLeavesOut) {
  std::vector<TokenId> script = bytes_to_tokens("bye");
  script.push_back(kEndOfText);
  const FakeEngine fake = fake_engine(say(script));
  GenerateRequest request = one_token_request(20);
  request.ignore_eos = true;
  for (const bool skip : {true, false}) {
    request.skip_special_tokens = skip;
    for (const char* stop : {"<|endoftext|>", "e<|end", "text|>x"}) {
      request.stop_strings = {stop};
      const GenerateResult result = run(*fake.engine, request);
      const std::string whole = "bye<|endoftext|>x";
      const std::string expected = whole.substr(0, whole.find(stop));
      EXPECT_EQ(result.text, skip ? expected.substr(0, 3) : expected) << stop;
      EXPECT_EQ(result.finish_reason, FinishReason::stop_string) << stop;
    }
  }
  request.skip_special_tokens = true;  // what is shown counts as well
  request.stop_strings = {"yex"};
  EXPECT_EQ(run(*fake.engine, request).text, "b");
}

TEST(Generate, HasNoFinishReasonWhileItRuns) {
  const FakeEngine fake = fake_engine(say("hello"));
  const std::unique_ptr<Generation> generation = fake.engine->start({one_token_request(3)});
  EXPECT_EQ(generation->results()[0].finish_reason, std::nullopt);
  generation->next();
  EXPECT_EQ(generation->results()[0].finish_reason, std::nullopt);
  while (generation->next()) {
  }
  EXPECT_EQ(generation->results()[0].finish_reason, FinishReason::token_limit);
}

TEST(Generate, MayFillTheContextCompletely) {
  const FakeEngine fake = fake_engine(say("", 60));
  GenerateRequest request;
  request.prompt_tokens.assign(60, 5);
  request.max_new_tokens = std::numeric_limits<std::int64_t>::max();
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_THAT(result.tokens, SizeIs(4));
  EXPECT_EQ(result.finish_reason, FinishReason::context_limit);
  EXPECT_THAT(fake.state->reserved, testing::Contains(testing::Ge(63)));
  EXPECT_THAT(fake.state->reserved, testing::Each(testing::Le(64)));

  request.max_new_tokens = 4;  // both limits at once
  EXPECT_EQ(run(*fake.engine, request).finish_reason, FinishReason::token_limit);
  request.prompt_tokens.assign(63, 5);
  request.max_new_tokens = 2;
  const FakeEngine full = fake_engine(say("", 63));
  EXPECT_THAT(run(*full.engine, request).tokens, SizeIs(1));
}

TEST(Generate, ZeroNewTokensComputesNothing) {
  const FakeEngine fake = fake_engine(say("hello"));
  GenerateRequest request = one_token_request(0);
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, "");
  EXPECT_THAT(result.tokens, IsEmpty());
  EXPECT_EQ(result.finish_reason, FinishReason::token_limit);
  EXPECT_THAT(fake.state->prefill_sizes, IsEmpty());
  EXPECT_EQ(result.statistics.prompt_tokens, 1);
}

TEST(Generate, NoRequestsGiveNoResults) {
  const FakeEngine fake = fake_engine(say("hello"));
  EXPECT_THAT(fake.engine->generate(std::vector<GenerateRequest>{}), IsEmpty());
}

TEST(Generate, ShowsOnlyWellFormedText) {
  const FakeEngine fake = fake_engine(say("a\xE2\x82\xAC\xFF\xE2\x82"));
  const auto generation = fake.engine->start({one_token_request(7)});
  std::vector<std::string> pieces;
  while (const auto event = generation->next()) pieces.push_back(event->text);
  EXPECT_THAT(pieces, ElementsAre("a", "", "", "€", "\uFFFD", "", "\uFFFD"));
}

TEST(Generate, PaddedIdsAreNotDrawnUnlessAllowedAndHaveNoText) {
  const FakeEngine fake = fake_engine(say(std::vector<TokenId>{kThe, kPadded, kThe, kLast}));
  GenerateRequest request = one_token_request(4);
  const GenerateResult without = run(*fake.engine, request);
  EXPECT_THAT(without.tokens, testing::Each(testing::Le(kLast)));
  EXPECT_EQ(without.tokens[0], kThe);
  request.allow_padded_ids = true;
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.text, " the theabcd");
  EXPECT_THAT(result.tokens, ElementsAre(kThe, kPadded, kThe, kLast));
}

TEST(Generate, DrawsNothingThatEndsTheTextBeforeItIsLongEnough) {
  const FakeEngine fake = fake_engine(hashed_logits());
  GenerateRequest request = one_token_request(20);
  request.stop_tokens.resize(kVocabSize - 2);
  std::iota(request.stop_tokens.begin(), request.stop_tokens.end(), 2);
  request.allow_padded_ids = true;
  EXPECT_THAT(run(*fake.engine, request).tokens, SizeIs(testing::Lt(3u)));
  request.min_new_tokens = 9;
  const GenerateResult result = run(*fake.engine, request);
  EXPECT_EQ(result.finish_reason, FinishReason::stop_token);
  ASSERT_THAT(result.tokens, SizeIs(testing::Ge(10u)));
  for (int i = 0; i < 9; ++i) EXPECT_EQ(result.tokens[i], 1) << "the only one that is left";
}

TEST(Generate, PrefillsInPieces) {
  const FakeEngine fake = fake_engine(say("ok", 10));
  GenerateRequest request;
  request.prompt = "0123456789";
  request.max_new_tokens = 2;
  EXPECT_EQ(run(*fake.engine, request).text, "ok");
  EXPECT_THAT(fake.state->prefill_sizes, ElementsAre(4, 4, 2));
}

TEST(Generate, SequencesThatEndLeaveTheBatch) {
  const FakeEngine fake = fake_engine(say("abcdef"));
  const auto results = run(*fake.engine, {one_token_request(2), one_token_request(0),
                                          one_token_request(4), one_token_request(3)});
  EXPECT_EQ(results[0].text, "ab");
  EXPECT_EQ(results[1].text, "");
  EXPECT_EQ(results[2].text, "abcd");
  EXPECT_EQ(results[3].text, "abc");
  EXPECT_THAT(fake.state->decode_batches, ElementsAre(3, 2, 1));
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Generate, DecodeAheadChangesNothing) {
  for (const std::int32_t ahead : {1, 2, 3, 8}) {
    const FakeEngine fake =
        fake_engine(hashed_logits(), [&](FakeState& state) { state.info.decode_ahead = ahead; });
    const FakeEngine plain = fake_engine(hashed_logits());
    std::vector<GenerateRequest> requests;
    for (int i = 0; i < 4; ++i) {
      GenerateRequest request = one_token_request(5 + 3 * i);
      request.prompt_tokens.push_back(i);
      request.sampling = {.temperature = 1, .seed = 9, .num_logprobs = 2};
      for (TokenId token = 10 * i; token < 20 + 15 * i; ++token) {
        request.stop_tokens.push_back(token);
      }
      requests.push_back(request);
    }
    const auto results = run(*fake.engine, requests);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const GenerateResult alone = run(*plain.engine, requests[i]);
      EXPECT_EQ(results[i].tokens, alone.tokens);
      EXPECT_EQ(results[i].text, alone.text);
      EXPECT_EQ(results[i].finish_reason, alone.finish_reason);
      ASSERT_EQ(results[i].sampled.size(), results[i].tokens.size());
      EXPECT_EQ(results[i].sampled.back().token, results[i].tokens.back());
      EXPECT_EQ(results[i].sampled.back().logprob, alone.sampled.back().logprob);
      EXPECT_THAT(results[i].sampled.back().top, SizeIs(2));
    }
    EXPECT_THAT(fake.state->live, IsEmpty());
  }
}

TEST(Cancel, EndsAllSequencesAndGivesHeldTextBack) {
  const FakeEngine fake = fake_engine(say("ab STOP"));
  std::vector<GenerateRequest> requests(2, one_token_request(50));
  requests[0].stop_strings = {"STOP"};
  requests[1].stop_strings = {"b ST_"};
  int events = 0;
  std::vector<std::string> texts(2);
  const auto results = fake.engine->generate(std::move(requests), [&](const GenerateEvent& event) {
    texts[event.index] += event.text;
    return ++events < 10;
  });
  for (const std::size_t i : {0, 1}) {
    EXPECT_EQ(results[i].text, "ab ST");
    EXPECT_EQ(texts[i], "ab ST");
    EXPECT_EQ(results[i].tokens, bytes_to_tokens("ab ST"));
    EXPECT_EQ(results[i].finish_reason, FinishReason::cancelled);
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Cancel, WorksBetweenPrefillPieces) {
  std::atomic<Generation*> running = nullptr;
  const FakeEngine fake = fake_engine(say("ok", 12), [&](FakeState& state) {
    state.before_step = [&] {
      wait_until([&] { return running != nullptr; });
      running.load()->cancel();
    };
    state.asks_to_stop = false;
  });
  GenerateRequest request;
  request.prompt_tokens.assign(12, 5);
  const auto generation = fake.engine->start({request});
  running = generation.get();
  const auto event = generation->next();
  ASSERT_TRUE(event);
  EXPECT_EQ(event->finish_reason, FinishReason::cancelled);
  EXPECT_FALSE(event->token);
  EXPECT_FALSE(generation->next());
  EXPECT_THAT(fake.state->prefill_sizes, ElementsAre(4));
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Cancel, GivesUpTheRunningStep) {
  for (const int step : {1, 2, 4}) {
    SCOPED_TRACE(step);
    std::atomic<Generation*> running = nullptr;
    std::atomic<int> seen = 0;
    int steps = 0;
    const FakeEngine fake = fake_engine(say("hello", 6), [&](FakeState& state) {
      state.before_step = [&] {
        if (++steps != step) return;
        wait_until([&] { return running != nullptr && seen == std::max(0, step - 2); });
        running.load()->cancel();
      };
    });
    GenerateRequest request = one_token_request(9);
    request.prompt_tokens.assign(6, 5);  // prefilled in two steps
    const auto generation = fake.engine->start({request});
    running = generation.get();
    while (generation->next()) ++seen;
    const GenerateResult& result = generation->results()[0];
    EXPECT_EQ(result.finish_reason, FinishReason::cancelled);
    EXPECT_EQ(result.text, step == 4 ? "he" : "") << "the step's own token does not come";
    EXPECT_EQ(steps, step);
    EXPECT_THAT(fake.state->live, IsEmpty());
  }
}

TEST(Interruption, EndsEveryCallWithAnErrorAndResultsAsCancelled) {
  std::atomic<bool> interrupted = false;
  std::atomic<int> seen = 0;
  int steps = 0;
  const FakeEngine fake = fake_engine(
      say("hello"),
      [&](FakeState& state) {
        state.before_step = [&] {
          // Asked at most every 20 ms.
          std::this_thread::sleep_for(std::chrono::milliseconds(25));
          if (++steps != 3) return;
          wait_until([&] { return seen >= 2; });  // the first token of each
          interrupted = true;
        };
      },
      1 << 20, [&] { return interrupted.load(); });
  const auto generation = fake.engine->start({one_token_request(9), one_token_request(9)});
  expect_error(ErrorKind::interrupted, HasSubstr("interrupted by the caller"), [&] {
    while (generation->next()) ++seen;
  });
  EXPECT_FALSE(generation->next());
  for (const GenerateResult& result : generation->results()) {
    EXPECT_EQ(result.finish_reason, FinishReason::cancelled);
    // What was computed meanwhile may have come out too.
    EXPECT_THAT(result.text, testing::StartsWith("h"));
    EXPECT_THAT("hello", testing::StartsWith(result.text));
  }
  const std::vector<TokenId> tokens(20, 5);
  std::vector<float> logits(20 * kVocabSize);
  const std::vector<std::function<void()>> calls{[&] { fake.engine->score(tokens); },
                                                 [&] { fake.engine->logits(tokens, logits); },
                                                 [&] { fake.engine->perplexity(tokens, 0, {}); }};
  for (const auto& call : calls) {
    std::this_thread::sleep_for(std::chrono::milliseconds(25));
    expect_error(ErrorKind::interrupted, HasSubstr("interrupted"), call);
  }
  interrupted = false;
  EXPECT_EQ(fake.engine->generate(one_token_request(2)).text, "he");
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Cancel, BeforeTheFirstCallAndAfterTheLast) {
  const FakeEngine fake = fake_engine(say("ok"));
  const auto generation = fake.engine->start({one_token_request(2)});
  generation->cancel();
  EXPECT_EQ(generation->next()->finish_reason, FinishReason::cancelled);
  EXPECT_FALSE(generation->next());
  generation->cancel();
  EXPECT_FALSE(generation->next());
}

TEST(Generation, FreesItsSequencesWhenDestroyed) {
  std::atomic<int> steps = 0;
  std::atomic<bool> go_on = false;
  const FakeEngine fake = fake_engine(say("hello"), [&](FakeState& state) {
    state.before_step = [&] {
      if (++steps == 3) wait_until([&] { return go_on.load(); });
    };
  });
  auto generation = fake.engine->start({one_token_request(9), one_token_request(9)});
  generation->next();
  wait_until([&] { return steps == 3; });
  EXPECT_THAT(fake.state->live, SizeIs(2));
  go_on = true;
  generation.reset();
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Generation, AnErrorEndsItAndFreesItsSequences) {
  int steps = 0;
  const FakeEngine fake = fake_engine(say("hello"), [&](FakeState& state) {
    state.before_step = [&] {
      if (++steps == 4) throw Error(ErrorKind::internal, "the device is gone");
    };
  });
  const auto generation = fake.engine->start({one_token_request(9), one_token_request(9)});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(generation->next());
  expect_error(ErrorKind::internal, HasSubstr("the device is gone"), [&] { generation->next(); });
  EXPECT_FALSE(generation->next());
  EXPECT_EQ(generation->results()[0].text, "he");
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Generation, RefusesWhatNeverFits) {
  const FakeEngine fake = fake_engine(say("hello"), [](FakeState& state) {
    state.info.max_positions = 1024;
    state.info.kv_pages = 2;
  });
  GenerateRequest request = one_token_request(9);
  request.prompt_tokens.assign(121, 5);
  expect_error(ErrorKind::out_of_memory,
               HasSubstr("may need 3 pages of 64 positions for its 121 prompt tokens and up to 9 "
                         "new ones, and the KV cache has 2"),
               [&] { fake.engine->start({request}); });
  EXPECT_THAT(fake.state->live, IsEmpty());
  request.max_new_tokens = 8;  // the last is not fed
  EXPECT_THAT(fake.engine->generate(request).tokens, SizeIs(8));
}

TEST(Generation, SaysWhereTheNonFiniteValueCameFrom) {
  const FakeEngine fake = fake_engine([](std::span<const TokenId>) {
    return std::vector<float>(kVocabSize, std::numeric_limits<float>::quiet_NaN());
  });
  expect_error(ErrorKind::non_finite,
               testing::AllOf(HasSubstr("the logit of token 0 is nan"),
                              HasSubstr("every weight of random-model-in-memory is finite")),
               [&] { fake.engine->generate(one_token_request(3)); });
}

TEST(Statistics, CountTimesAndBytes) {
  const FakeEngine fake = fake_engine(say("hello"), [](FakeState& state) {
    state.before_step = [] { std::this_thread::sleep_for(std::chrono::milliseconds(1)); };
  });
  EXPECT_EQ(fake.engine->measure_read_ceiling(), 1e9);
  EXPECT_EQ(fake.engine->measure_read_ceiling(), 1e9);
  EXPECT_EQ(fake.state->ceilings_measured, 1);
  const auto results = run(*fake.engine, {one_token_request(3), one_token_request(3)});
  for (const GenerateResult& result : results) {
    const Statistics& s = result.statistics;
    EXPECT_EQ(s.prompt_tokens, 1);
    EXPECT_EQ(s.new_tokens, 3);
    EXPECT_GT(s.prefill_seconds, 0);
    EXPECT_GE(s.time_to_first_token_seconds, s.prefill_seconds);
    EXPECT_GT(s.decode_seconds, 0);
    EXPECT_DOUBLE_EQ(s.seconds_per_token, s.decode_seconds / 2);
    EXPECT_DOUBLE_EQ(s.tokens_per_second, 2 / s.decode_seconds);
    // Two steps of two sequences, whose contexts are then 2 and 3 positions of 16 bytes.
    const double bytes =
        2.0 * static_cast<double>(tiny_model()->bytes_per_token()) + 2 * (2 + 3) * 16;
    EXPECT_NEAR(s.bytes_per_second * s.decode_seconds, bytes, 1e-6 * bytes);
    EXPECT_EQ(s.read_ceiling_bytes_per_second, 1e9);
    EXPECT_DOUBLE_EQ(s.ceiling_share, s.bytes_per_second / 1e9);
  }
}

TEST(Statistics, UndefinedOnesAreZero) {
  const FakeEngine fake = fake_engine(say("hello"));
  const Statistics s = run(*fake.engine, one_token_request(1)).statistics;
  EXPECT_EQ(s.seconds_per_token, 0);
  EXPECT_EQ(s.tokens_per_second, 0);
  EXPECT_EQ(s.bytes_per_second, 0);
  EXPECT_EQ(s.read_ceiling_bytes_per_second, 0);
  EXPECT_EQ(s.ceiling_share, 0);
}

TEST(Threads, ShareOneEngine) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const auto request_of = [](int i) {
    GenerateRequest request = one_token_request(40);
    request.prompt_tokens.push_back(i);
    request.sampling = {.temperature = 1, .seed = 3};
    return request;
  };
  std::vector<GenerateResult> results(4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 5; ++round) {
        results[i] = fake.engine->generate(request_of(i));
        fake.engine->score(results[i].prompt_tokens);
        fake.engine->measure_read_ceiling();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(results[i].tokens, fake.engine->generate(request_of(i)).tokens);
  }
  EXPECT_EQ(fake.state->ceilings_measured, 1);
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Threads, CancelFromAnotherThread) {
  const FakeEngine fake =
      fake_engine(say(""), [](FakeState& state) { state.info.max_positions = 1 << 20; });
  const auto generation = fake.engine->start({one_token_request(1 << 19)});
  generation->next();
  std::thread other([&] { generation->cancel(); });
  while (generation->next()) {
  }
  other.join();
  EXPECT_EQ(generation->results()[0].finish_reason, FinishReason::cancelled);
}

// The prompt's tokens have the scores of Engine::score, whatever is generated behind them.
TEST(Generate, ScoresThePromptIfAsked) {
  const FakeEngine fake = fake_engine(hashed_logits());
  for (const std::size_t length : {1u, 4u, 5u, 11u}) {
    for (const std::int64_t new_tokens : {0, 3}) {
      GenerateRequest request;
      request.max_new_tokens = new_tokens;
      for (std::size_t i = 0; i < length; ++i) {
        request.prompt_tokens.push_back(static_cast<TokenId>(7 * i + 1));
      }
      const GenerateResult plain = run(*fake.engine, request);
      EXPECT_THAT(plain.prompt_scores, IsEmpty());
      for (const std::int32_t num_top : {0, 2}) {
        request.num_prompt_logprobs = num_top;
        const GenerateResult scored = run(*fake.engine, request);
        EXPECT_EQ(scored.tokens, plain.tokens);
        EXPECT_EQ(scored.finish_reason, plain.finish_reason);
        ASSERT_THAT(scored.prompt_scores, SizeIs(length - 1));
        if (length == 1) continue;
        const ScoreResult expected = fake.engine->score(std::span(request.prompt_tokens));
        for (std::size_t i = 0; i + 1 < length; ++i) {
          EXPECT_EQ(scored.prompt_scores[i].token, request.prompt_tokens[i + 1]);
          EXPECT_EQ(scored.prompt_scores[i].logprob, expected.logprobs[i]);
          EXPECT_THAT(scored.prompt_scores[i].top, SizeIs(num_top));
        }
      }
    }
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Generate, ScoresAPromptThatFillsTheContext) {
  const FakeEngine fake = fake_engine(hashed_logits());
  GenerateRequest request;
  request.prompt_tokens.assign(64, 5);
  request.max_new_tokens = 0;
  request.num_prompt_logprobs = 0;
  EXPECT_THAT(run(*fake.engine, request).prompt_scores, SizeIs(63));
  request.num_prompt_logprobs = 101;
  expect_error(ErrorKind::invalid_argument, HasSubstr("num_prompt_logprobs must be in [-1, 100]"),
               [&] { fake.engine->generate(request); });
}

}  // namespace
}  // namespace clusterfusion
