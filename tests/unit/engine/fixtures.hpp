// Engines over scripts and a tokenizer whose tokens a test can read.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "clusterfusion/error.hpp"
#include "engine/fake_backend.hpp"
#include "engine/scheduler.hpp"

namespace clusterfusion::test {

// Ids of byte_tokenizer(): 0 is <|endoftext|> (special), 1 + b is byte b, then these.
inline constexpr TokenId kEndOfText = 0;
inline constexpr TokenId kThe = 257;     // " the"
inline constexpr TokenId kEnding = 258;  // "the END of"
inline constexpr TokenId kLast = 259;    // "abcd"
inline constexpr TokenId kPadded = 300;  // beyond the tokenizer
inline constexpr std::int64_t kVocabSize = 320;

std::shared_ptr<const Tokenizer> byte_tokenizer();
// A tokenizer.json with ids from 0 to size - 1: "t0", "t1", ...
std::string tokenizer_json(int size);
// The same with an added token.
std::string with_added_token(const std::string& json, int id, const std::string& content);
// One token for each byte.
std::vector<TokenId> bytes_to_tokens(std::string_view text);

// Any of kVocabSize tokens.
std::vector<TokenId> random_tokens(std::size_t count, unsigned seed);

// A model of kVocabSize tokens without layers to speak of; end-of-text is kEndOfText.
std::shared_ptr<const Model> tiny_model();

// After a prompt of `prompt_size` tokens come `continuation` and then byte 'x' for ever.
Script say(std::vector<TokenId> continuation, std::size_t prompt_size = 1);
Script say(std::string_view continuation, std::size_t prompt_size = 1);
// Logits that depend on all tokens, all different.
Script hashed_logits();

struct FakeEngine {
  std::shared_ptr<FakeState> state = std::make_shared<FakeState>();
  std::unique_ptr<Engine> engine;
};
// `set` may change the state before the engine is made; `capacity` is the device's, in pages.
FakeEngine fake_engine(Script script, const std::function<void(FakeState&)>& set = {},
                       std::int64_t capacity = 1 << 14, StopRequest interrupted = {},
                       SchedulerOptions scheduling = {});

// The same with a state that is there already, for what else looks at its clock.
FakeEngine fake_engine_in(std::shared_ptr<FakeState> state, Script script,
                          const std::function<void(FakeState&)>& set, SchedulerOptions scheduling);

// A request with a prompt of one token.
GenerateRequest one_token_request(std::int64_t max_new_tokens);

template <typename Condition>
void wait_until(Condition condition) {
  while (!condition()) std::this_thread::yield();
}

// Expects an Error of `kind` whose message matches `message`.
template <typename Action>
void expect_error(ErrorKind kind, const testing::Matcher<std::string>& message, Action action) {
  try {
    action();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind);
    EXPECT_THAT(std::string(error.what()), message);
  }
}

}  // namespace clusterfusion::test
