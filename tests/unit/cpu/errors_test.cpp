// What a backend refuses, with which words, and that nothing has changed after it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "clusterfusion/error.hpp"
#include "sequences.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

void expect_error(ErrorKind kind, const testing::Matcher<const std::string&>& text,
                  const std::function<void()>& call) {
  try {
    call();
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind);
    EXPECT_THAT(std::string(error.what()), text);
  }
}

class Errors : public testing::Test {
 protected:
  Errors() {
    config_ = small_config();
    config_.max_positions = 100;
    model_ = make_random_model(config_);
    backend_ = make_cpu_backend(model_, {});
    id_ = backend_->create_sequence({});
    tokens_ = random_tokens(config_, 40, 1);
    backend_->prefill(id_, tokens_, {});
  }
  // The sequence has its 40 positions, and its next logits are those of an untouched one.
  ~Errors() override {
    EXPECT_EQ(backend_->length(id_), 40);
    const SequenceId fresh = backend_->create_sequence({});
    backend_->prefill(fresh, tokens_, {});
    EXPECT_EQ(decode_logits(*backend_, config_, id_, 3),
              decode_logits(*backend_, config_, fresh, 3));
  }

  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
  SequenceId id_ = 0;
  std::vector<TokenId> tokens_;
};

// In the middle of a call, wherever the request comes; the fixture looks at the sequence.
TEST_F(Errors, StopsOnRequest) {
  const std::vector<TokenId> more = random_tokens(config_, 30, 2);
  std::vector<float> logits(static_cast<std::size_t>(config_.vocab_size));
  SampledToken sampled;
  for (const bool prefill : {true, false}) {
    const auto call = [&] {
      if (prefill) {
        PrefillOutput output;
        output.sampled = &sampled;
        backend_->prefill(id_, more, output);
      } else {
        backend_->decode({&id_, 1}, {more.data(), 1}, 1, {&sampled, 1}, logits);
      }
    };
    int questions = 0;
    for (int stop_at = 1; stop_at < 1000; ++stop_at) {
      questions = 0;
      backend_->set_stop_request([&] { return ++questions == stop_at; });
      try {
        call();
      } catch (const Stopped&) {
        continue;
      }
      backend_->truncate(id_, 40);
      break;
    }
    EXPECT_GT(questions, 2) << "it was asked in the middle";
  }
  backend_->set_stop_request([] { return true; });
  EXPECT_THROW(backend_->measure_read_ceiling(), Stopped);
  backend_->set_stop_request({});
}

TEST_F(Errors, Options) {
  const auto open = [&](int threads, std::int64_t positions) {
    return [=, this] { make_cpu_backend(model_, {threads, positions, std::nullopt}); };
  };
  expect_error(ErrorKind::invalid_argument, AllOf(HasSubstr("threads"), HasSubstr("-1")),
               open(-1, 0));
  expect_error(ErrorKind::invalid_argument, AllOf(HasSubstr("max_positions"), HasSubstr("101")),
               open(0, 101));
  expect_error(ErrorKind::invalid_argument, HasSubstr("-5"), open(0, -5));
}

TEST_F(Errors, TokenIdsNameTheirIndex) {
  for (const TokenId bad : {-1, 301, std::numeric_limits<TokenId>::max()}) {
    const std::vector<TokenId> tokens = {0, 300, bad, 1};
    expect_error(
        ErrorKind::out_of_range,
        AllOf(HasSubstr("tokens[2]"), HasSubstr(std::to_string(bad)), HasSubstr("[0, 301)")),
        [&] { backend_->prefill(id_, tokens, {}); });
    expect_error(ErrorKind::out_of_range, HasSubstr("inputs[0]"),
                 [&] { decode_logits(*backend_, config_, id_, bad); });
  }
  PrefillOutput output;
  const std::vector<TokenId> targets = {1, 301};
  std::vector<float> logprobs(2);
  output.targets = targets;
  output.target_logprobs = logprobs;
  expect_error(ErrorKind::out_of_range, HasSubstr("targets[1]"), [&] {
    backend_->prefill(id_, std::vector<TokenId>{1, 2}, output);
  });
}

TEST_F(Errors, NoTokens) {
  expect_error(ErrorKind::invalid_argument, HasSubstr("at least one token"),
               [&] { backend_->prefill(id_, {}, {}); });
}

TEST_F(Errors, ContextFull) {
  expect_error(ErrorKind::invalid_argument,
               AllOf(HasSubstr("40 positions"), HasSubstr("61 more"), HasSubstr("100")),
               [&] { backend_->prefill(id_, random_tokens(config_, 61, 2), {}); });
  backend_->prefill(id_, random_tokens(config_, 60, 2), {});
  expect_error(ErrorKind::invalid_argument, HasSubstr("1 more"),
               [&] { decode_logits(*backend_, config_, id_, 1); });
  backend_->truncate(id_, 40);
}

TEST_F(Errors, Sequences) {
  const auto unknown = HasSubstr("no sequence 77");
  expect_error(ErrorKind::invalid_argument, unknown, [&] { backend_->length(77); });
  expect_error(ErrorKind::invalid_argument, unknown, [&] { backend_->release_sequence(77); });
  expect_error(ErrorKind::invalid_argument, unknown, [&] { backend_->truncate(77, 0); });
  expect_error(ErrorKind::invalid_argument, unknown, [&] { backend_->reserve(77, 1); });
  expect_error(ErrorKind::invalid_argument, unknown, [&] { backend_->prefill(77, tokens_, {}); });
  expect_error(ErrorKind::invalid_argument, unknown,
               [&] { decode_logits(*backend_, config_, 77, 0); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("sequences[1]"), [&] {
    const SequenceId twice[] = {id_, id_};
    const TokenId inputs[] = {1, 2};
    backend_->decode(twice, inputs, 1, {}, {});
  });
  expect_error(ErrorKind::invalid_argument, HasSubstr("it has 40"),
               [&] { backend_->truncate(id_, 41); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("-1"), [&] { backend_->truncate(id_, -1); });
  expect_error(ErrorKind::invalid_argument, AllOf(HasSubstr("101"), HasSubstr("100")),
               [&] { backend_->reserve(id_, 101); });
}

TEST_F(Errors, Sizes) {
  std::vector<float> wrong(5);
  PrefillOutput output;
  output.last_logits = wrong;
  expect_error(ErrorKind::invalid_argument, HasSubstr("last_logits"),
               [&] { backend_->prefill(id_, tokens_, output); });
  output = {};
  output.all_logits = wrong;
  expect_error(ErrorKind::invalid_argument, HasSubstr("40 x 301"),
               [&] { backend_->prefill(id_, tokens_, output); });
  output = {};
  output.targets = tokens_;
  expect_error(ErrorKind::invalid_argument, HasSubstr("target_logprobs"),
               [&] { backend_->prefill(id_, tokens_, output); });
  std::vector<float> logprobs(tokens_.size());
  std::vector<std::uint8_t> is_likeliest(tokens_.size() - 1);
  output.target_logprobs = logprobs;
  output.target_is_likeliest = is_likeliest;
  expect_error(ErrorKind::invalid_argument, HasSubstr("target_is_likeliest must have as many"),
               [&] { backend_->prefill(id_, tokens_, output); });
  const TokenId input[] = {1};
  expect_error(ErrorKind::invalid_argument, HasSubstr("batch x vocabulary"), [&] {
    backend_->decode({&id_, 1}, input, 1, {}, wrong);
  });
  std::vector<SampledToken> sampled(2);
  expect_error(ErrorKind::invalid_argument, HasSubstr("sampled"), [&] {
    backend_->decode({&id_, 1}, input, 1, sampled, {});
  });
  for (const std::int32_t steps : {0, -1, 2}) {
    expect_error(ErrorKind::invalid_argument, HasSubstr("steps"), [&] {
      backend_->decode({&id_, 1}, input, steps, {}, {});
    });
  }
  expect_error(ErrorKind::invalid_argument, HasSubstr("0 sequences"),
               [&] { backend_->decode({}, {}, 1, {}, {}); });
}

// A checkpoint whose numbers are not finite: said with the position, and the sequence is unharmed.
TEST(NonFinite, IsSaidAndUndone) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const ModelConfig config = small_config();
    const auto model = make_random_model(config);
    const auto backend = make_cpu_backend(model, {});
    const SequenceId id = backend->create_sequence({});
    const auto tokens = random_tokens(config, 30, 4);
    backend->prefill(id, tokens, {});
    const std::vector<float> before = [&] {
      const auto logits = decode_logits(*backend, config, id, 5);
      backend->truncate(id, 30);
      return logits;
    }();
    // Token 7's embedding goes bad.
    auto* row = static_cast<std::uint16_t*>(model->weights().embedding.data) + 7 * 64;
    const std::uint16_t old = row[3];
    row[3] = narrow(bad, DType::float16);
    expect_error(ErrorKind::non_finite, AllOf(HasSubstr("position 30"), HasSubstr("not finite")),
                 [&] { decode_logits(*backend, config, id, 7); });
    expect_error(ErrorKind::non_finite, HasSubstr("position 32"), [&] {
      prefill_logits(*backend, config, id, std::vector<TokenId>{1, 2, 7, 4});
    });
    EXPECT_EQ(backend->length(id), 30);
    row[3] = old;
    EXPECT_EQ(decode_logits(*backend, config, id, 5), before);
  }
}

// More KV cache than any machine has: refused with the numbers, and the pool goes on working.
TEST(OutOfMemory, IsSaidWithNumbers) {
  ModelConfig config = small_config();
  config.max_positions = std::int64_t{1} << 40;
  const auto model = make_random_model(config);
  const auto backend = make_cpu_backend(model, {});
  const SequenceId id = backend->create_sequence({});
  expect_error(ErrorKind::out_of_memory, AllOf(HasSubstr("KV cache"), HasSubstr("GB")),
               [&] { backend->reserve(id, std::int64_t{1} << 40); });
  backend->prefill(id, random_tokens(config, 10, 1), {});
  EXPECT_EQ(backend->length(id), 10);
}

}  // namespace
}  // namespace clusterfusion::test
