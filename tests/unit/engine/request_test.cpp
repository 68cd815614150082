#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::HasSubstr;
using testing::IsEmpty;

struct BadRequest {
  std::string name;
  std::function<void(GenerateRequest&)> spoil;
  ErrorKind kind;
  std::string message;
};

class ImpossibleRequests : public testing::TestWithParam<BadRequest> {};

TEST_P(ImpossibleRequests, AreRefusedBeforeAnythingIsAllocated) {
  const FakeEngine fake = fake_engine(say("hello"));
  GenerateRequest bad = one_token_request(5);
  GetParam().spoil(bad);
  expect_error(GetParam().kind, HasSubstr(GetParam().message), [&] { fake.engine->start({bad}); });
  expect_error(GetParam().kind, HasSubstr("requests[1]: " + GetParam().message), [&] {
    fake.engine->start({one_token_request(1), bad});
  });
  EXPECT_THAT(fake.state->reserved, IsEmpty());
  EXPECT_THAT(fake.state->live, IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(
    All, ImpossibleRequests,
    testing::Values(
        BadRequest{"no_tokens", [](auto& r) { r.prompt_tokens.clear(); },
                   ErrorKind::invalid_argument,
                   "the prompt has no tokens, and the model needs at least one to start from; pass "
                   "some text, or token ids as prompt_tokens, for example token 0 (eos_token_id)"},
        BadRequest{"min_new_tokens", [](auto& r) { r.min_new_tokens = 6; },
                   ErrorKind::invalid_argument,
                   "min_new_tokens must be in [0, 5] (max_new_tokens), got 6"},
        BadRequest{"logit_bias",
                   [](auto& r) {
                     r.sampling.logit_bias = {{320, 1.0f}};
                   },
                   ErrorKind::out_of_range,
                   "logit_bias[0] is 320, expected a token id in [0, 320)"},
        BadRequest{"frequency_penalty", [](auto& r) { r.sampling.frequency_penalty = 3; },
                   ErrorKind::invalid_argument, "frequency_penalty must be in [-2, 2]"},
        BadRequest{"prompt_too_long", [](auto& r) { r.prompt_tokens.assign(64, 5); },
                   ErrorKind::invalid_argument,
                   "the prompt has 64 tokens, and the context of 64 positions has room for 63 and "
                   "a new token; shorten the prompt by 1 or more tokens"},
        BadRequest{"prompt_too_long_to_do_nothing_with",
                   [](auto& r) {
                     r.prompt_tokens.assign(70, 5);
                     r.max_new_tokens = 0;
                   },
                   ErrorKind::invalid_argument,
                   "the prompt has 70 tokens, and the context of 64 positions has room for 64; "
                   "shorten the prompt by 6 or more tokens"},
        BadRequest{"text_too_long",
                   [](auto& r) {
                     r.prompt_tokens.clear();
                     r.prompt.assign(100, 'a');
                   },
                   ErrorKind::invalid_argument, "the prompt has 100 tokens"},
        BadRequest{"id_too_large",
                   [](auto& r) {
                     r.prompt_tokens = {1, 2, 320};
                   },
                   ErrorKind::out_of_range,
                   "prompt_tokens[2] is 320, expected a token id in [0, 320) (the model's "
                   "vocab_size)"},
        BadRequest{"id_negative", [](auto& r) { r.prompt_tokens = {-1}; }, ErrorKind::out_of_range,
                   "prompt_tokens[0] is -1"},
        BadRequest{"stop_token",
                   [](auto& r) {
                     r.stop_tokens = {3, 3, 999};
                   },
                   ErrorKind::out_of_range, "stop_tokens[2] is 999"},
        BadRequest{"max_new_tokens", [](auto& r) { r.max_new_tokens = -1; },
                   ErrorKind::invalid_argument, "max_new_tokens must be >= 0, got -1"},
        BadRequest{"empty_stop_string",
                   [](auto& r) {
                     r.stop_strings = {"a", "a", ""};
                   },
                   ErrorKind::invalid_argument, "stop_strings[2] is empty"},
        BadRequest{"broken_stop_string", [](auto& r) { r.stop_strings = {"\x80"}; },
                   ErrorKind::invalid_argument, "stop_strings[0] is not UTF-8"},
        BadRequest{"sampling",
                   [](auto& r) { r.sampling.top_p = std::numeric_limits<float>::quiet_NaN(); },
                   ErrorKind::invalid_argument, "top_p must be in (0, 1]"}),
    [](const auto& info) { return info.param.name; });

TEST(Requests, DuplicatesAreFine) {
  const FakeEngine fake = fake_engine(say("hello"));
  GenerateRequest request = one_token_request(5);
  request.stop_strings = {"ll", "ll"};
  request.stop_tokens = {3, 3};
  EXPECT_EQ(fake.engine->generate(request).text, "he");
}

TEST(Requests, AFullContextIsAllowedWithoutNewTokens) {
  const FakeEngine fake = fake_engine(say("hello"));
  GenerateRequest request = one_token_request(0);
  request.prompt_tokens.assign(64, 5);
  EXPECT_EQ(fake.engine->generate(request).finish_reason, FinishReason::token_limit);
}

TEST(Requests, WithoutATokenizerOnlyIdsAreTaken) {
  const auto state = std::make_shared<FakeState>();
  const auto engine =
      make_engine(tiny_model(), nullptr,
                  std::make_unique<FakeBackend>(state, kVocabSize, say("hello")), "a test");
  EXPECT_FALSE(engine->has_tokenizer());
  expect_error(ErrorKind::not_found, HasSubstr("no tokenizer.json"), [&] { engine->tokenizer(); });
  const GenerateResult result = engine->generate(one_token_request(5));
  EXPECT_EQ(result.tokens, bytes_to_tokens("hello"));
  EXPECT_EQ(result.text, "");

  GenerateRequest text;
  text.prompt = "hi";
  expect_error(ErrorKind::not_found, HasSubstr("has no tokenizer.json, and text needs a tokenizer"),
               [&] { engine->start({text}); });
  GenerateRequest stop = one_token_request(3);
  stop.stop_strings = {"x"};
  expect_error(ErrorKind::not_found, HasSubstr("has no tokenizer.json, and text needs a tokenizer"),
               [&] { engine->start({stop}); });
}

// As after add_special_tokens() without resizing the embeddings.
TEST(MakeEngine, WarnsOfATokenizerWithMoreIdsThanTheModel) {
  const auto state = std::make_shared<FakeState>();
  const auto open = [&](int size) {
    const auto tokenizer = Tokenizer::parse(tokenizer_json(size), "test");
    return make_engine(tiny_model(), tokenizer,
                       std::make_unique<FakeBackend>(state, kVocabSize, say("hello")), "a test");
  };
  EXPECT_THAT(open(320)->warnings(), IsEmpty());
  const auto engine = open(321);
  EXPECT_THAT(engine->warnings(),
              testing::ElementsAre(testing::AllOf(
                  HasSubstr("ids up to 320, and the model's vocab_size is 320"),
                  HasSubstr("\"t320\" (the only such token)"), HasSubstr("refused"))));
  EXPECT_THAT(open(330)->warnings(),
              testing::ElementsAre(HasSubstr("\"t320\" (the first such token)")));
  EXPECT_EQ(engine->generate(one_token_request(5)).tokens, bytes_to_tokens("hello"));
}

TEST(Requests, RefuseTextWithATokenThatTheModelDoesNotHave) {
  const auto state = std::make_shared<FakeState>();
  std::string json = tokenizer_json(320);
  const auto tokenizer = Tokenizer::parse(with_added_token(json, 320, "[PAD]"), "test");
  const auto engine = make_engine(
      tiny_model(), tokenizer, std::make_unique<FakeBackend>(state, kVocabSize, say("")), "a test");
  GenerateRequest request;
  request.prompt = "[PAD]";
  expect_error(ErrorKind::out_of_range,
               HasSubstr("the prompt's token[0] is 320, expected a token id in [0, 320)"),
               [&] { engine->start({request}); });
}

}  // namespace
}  // namespace clusterfusion
