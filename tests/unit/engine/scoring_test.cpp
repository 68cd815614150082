#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<TokenId> random_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % kVocabSize);
  return tokens;
}

// -log softmax(script(context))[next].
double negative_log_likelihood(std::span<const TokenId> context, TokenId next) {
  const std::vector<float> logits = hashed_logits()(context);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  return std::log(sum) - logits[next];
}

// The loop of the Hugging Face documentation (perplexity.md), line by line.
struct Reference {
  double perplexity;
  std::int64_t num_tokens;
};
Reference documented_perplexity(const std::vector<TokenId>& input_ids, std::int64_t max_length,
                                std::int64_t stride) {
  const std::int64_t seq_len = std::ssize(input_ids);
  double nll_sum = 0;
  std::int64_t n_tokens = 0;
  std::int64_t prev_end_loc = 0;
  for (std::int64_t begin_loc = 0; begin_loc < seq_len; begin_loc += stride) {
    const std::int64_t end_loc = std::min(begin_loc + max_length, seq_len);
    const std::int64_t trg_len = end_loc - prev_end_loc;
    const std::vector<TokenId> window(input_ids.begin() + begin_loc, input_ids.begin() + end_loc);
    std::vector<TokenId> target_ids = window;
    for (std::int64_t i = 0; i < std::ssize(window) - trg_len; ++i) target_ids[i] = -100;

    // model(input_ids, labels=target_ids).loss: labels are shifted by one, -100 is ignored.
    double loss = 0;
    std::int64_t num_labels = 0;
    for (std::int64_t i = 0; i + 1 < std::ssize(window); ++i) {
      if (target_ids[i + 1] == -100) continue;
      loss += negative_log_likelihood(std::span(window).first(i + 1), target_ids[i + 1]);
      ++num_labels;
    }
    if (num_labels > 0) loss /= static_cast<double>(num_labels);

    const std::int64_t num_valid_tokens =
        std::count_if(target_ids.begin(), target_ids.end(), [](TokenId id) { return id != -100; });
    const std::int64_t num_loss_tokens = num_valid_tokens - 1;
    nll_sum += loss * static_cast<double>(num_loss_tokens);
    n_tokens += num_loss_tokens;
    prev_end_loc = end_loc;
    if (end_loc == seq_len) break;
  }
  return {std::exp(nll_sum / static_cast<double>(n_tokens)), n_tokens};
}

TEST(Perplexity, EqualsTheDocumentedLoop) {
  const FakeEngine fake = fake_engine(hashed_logits());
  for (const std::size_t count : {2u, 3u, 9u, 32u, 33u, 100u}) {
    const std::vector<TokenId> tokens = random_tokens(count, 1);
    for (const std::int64_t context : {2, 3, 8, 32, 64}) {
      for (const std::int64_t stride :
           {std::int64_t{2}, std::int64_t{5}, context / 2, context - 1, context}) {
        if (stride < 2 || stride > context) continue;
        SCOPED_TRACE(testing::Message()
                     << count << " tokens, context " << context << ", stride " << stride);
        const PerplexityResult result =
            fake.engine->perplexity(tokens, 70,
                                    {.context = context,
                                     .stride = stride,
                                     .method = PerplexityMethod::transformers_docs,
                                     .progress = {}});
        const Reference expected = documented_perplexity(tokens, context, stride);
        EXPECT_NEAR(result.perplexity, expected.perplexity, 1e-5 * expected.perplexity);
        EXPECT_NEAR(result.mean_nll, std::log(expected.perplexity), 1e-5);
        EXPECT_EQ(result.scored_tokens, expected.num_tokens);
        EXPECT_EQ(result.total_tokens, std::ssize(tokens));
        EXPECT_EQ(result.bits_per_byte, 0);
      }
    }
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

// The sum over all tokens but the first, each in the first window that holds it, given the tokens
// before it there. Windows that do not overlap also hold the token before them.
double nll_of_each_token(const std::vector<TokenId>& tokens, std::int64_t context,
                         std::int64_t stride) {
  double total = 0;
  for (std::int64_t i = 1; i < std::ssize(tokens); ++i) {
    std::int64_t begin = 0;
    while (begin + context <= i) begin += stride;
    if (begin > 0 && stride == context) --begin;
    total += negative_log_likelihood(std::span(tokens).subspan(begin, i - begin), tokens[i]);
  }
  return total;
}

TEST(Perplexity, ScoresAndCountsEachTokenOnce) {
  const FakeEngine fake = fake_engine(hashed_logits());
  for (const std::size_t count : {2u, 3u, 9u, 33u, 100u}) {
    const std::vector<TokenId> tokens = random_tokens(count, 11);
    for (const std::int64_t context : {2, 3, 8, 64}) {
      for (const std::int64_t stride : {std::int64_t{1}, std::int64_t{2}, context / 2, context}) {
        SCOPED_TRACE(testing::Message()
                     << count << " tokens, context " << context << ", stride " << stride);
        const PerplexityResult result = fake.engine->perplexity(
            tokens, 70, {.context = context, .stride = stride, .progress = {}});
        const double total = nll_of_each_token(tokens, context, stride);
        EXPECT_EQ(result.scored_tokens, std::ssize(tokens) - 1);
        EXPECT_EQ(result.total_tokens, std::ssize(tokens));
        EXPECT_NEAR(result.mean_nll, total / static_cast<double>(count - 1), 1e-5);
        EXPECT_NEAR(result.perplexity, std::exp(total / static_cast<double>(count - 1)),
                    1e-5 * result.perplexity);
        EXPECT_NEAR(result.bits_per_byte, total / std::log(2.0) / 70, 1e-4);
      }
    }
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Perplexity, DefaultsToTheWholeContextAndHalfOfIt) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<TokenId> tokens = random_tokens(150, 2);
  EXPECT_NEAR(fake.engine->perplexity(tokens, 0, {}).mean_nll,
              nll_of_each_token(tokens, 64, 32) / 149, 1e-5);
}

TEST(Perplexity, BitsPerByteAreOverTheTextOfTheScoredTokens) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<TokenId> tokens = bytes_to_tokens("some text");
  const PerplexityResult of_tokens = fake.engine->perplexity(tokens, 8, {});
  const PerplexityResult of_text = fake.engine->perplexity("some text", true, {});
  EXPECT_GT(of_text.bits_per_byte, 0);
  EXPECT_EQ(of_text.bits_per_byte, of_tokens.bits_per_byte);
  EXPECT_EQ(of_text.mean_nll, of_tokens.mean_nll);
}

TEST(Perplexity, ReportsProgressAndCanBeCancelled) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<TokenId> tokens = random_tokens(20, 4);
  std::vector<std::int64_t> done;
  PerplexityOptions options{.context = 8, .stride = 4, .progress = {}};
  options.progress = [&](std::int64_t count, std::int64_t total) {
    EXPECT_EQ(total, 20);
    done.push_back(count);
    return true;
  };
  fake.engine->perplexity(tokens, 0, options);
  EXPECT_THAT(done, testing::ElementsAre(8, 12, 16, 20));

  options.progress = [](std::int64_t count, std::int64_t) { return count < 12; };
  const PerplexityResult cut = fake.engine->perplexity(tokens, 0, options);
  EXPECT_EQ(cut.scored_tokens, 7 + 4);
  EXPECT_EQ(cut.total_tokens, 20);
  EXPECT_TRUE(std::isfinite(cut.perplexity));
}

TEST(Perplexity, RefusesImpossibleOptions) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<TokenId> tokens = random_tokens(20, 5);
  const auto measure = [&](std::int64_t context, std::int64_t stride,
                           PerplexityMethod method = PerplexityMethod::each_token) {
    return [&, context, stride, method] {
      fake.engine->perplexity(
          tokens, 0, {.context = context, .stride = stride, .method = method, .progress = {}});
    };
  };
  const ErrorKind kind = ErrorKind::invalid_argument;
  expect_error(kind, HasSubstr("context must be in [2, 64]"), measure(65, 2));
  expect_error(kind, HasSubstr("or 0 for the longest, got 1"), measure(1, 2));
  expect_error(kind, HasSubstr("got -3"), measure(-3, 2));
  expect_error(kind, HasSubstr("stride must be in [1, 8]"), measure(8, 9));
  // The documented weights would let only the first window count.
  expect_error(kind, HasSubstr("got 1"), measure(8, 1, PerplexityMethod::transformers_docs));
  expect_error(kind, HasSubstr("got -1"), measure(8, -1));
  expect_error(kind, HasSubstr("perplexity needs at least 2 tokens"),
               [&] { fake.engine->perplexity(std::span(tokens).first(1), 0, {}); });
  expect_error(kind, HasSubstr("bytes must be >= 0"),
               [&] { fake.engine->perplexity(tokens, -1, {}); });
  expect_error(ErrorKind::out_of_range, HasSubstr("tokens[1] is 320"), [&] {
    fake.engine->perplexity(std::vector<TokenId>{1, 320}, 0, {});
  });
}

TEST(Score, EqualsTheLogProbabilitiesOfTheTokens) {
  const FakeEngine fake = fake_engine(hashed_logits());
  for (const std::size_t count : {2u, 4u, 5u, 6u, 64u}) {
    const std::vector<TokenId> tokens = random_tokens(count, 6);
    const ScoreResult result = fake.engine->score(tokens);
    EXPECT_EQ(result.tokens, tokens);
    ASSERT_EQ(result.logprobs.size(), count - 1);
    double total = 0;
    for (std::size_t i = 0; i + 1 < count; ++i) {
      EXPECT_NEAR(result.logprobs[i],
                  -negative_log_likelihood(std::span(tokens).first(i + 1), tokens[i + 1]), 1e-5);
      total += result.logprobs[i];
    }
    EXPECT_DOUBLE_EQ(result.total, total);
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Score, RefusesWhatItCannotScore) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const ErrorKind kind = ErrorKind::invalid_argument;
  expect_error(kind, HasSubstr("at least 2 tokens"),
               [&] { fake.engine->score(std::vector<TokenId>{1}); });
  expect_error(kind,
               HasSubstr("there are 65 tokens, and the context holds 64; score a shorter "
                         "text, or measure perplexity"),
               [&] { fake.engine->score(random_tokens(65, 7)); });
  expect_error(ErrorKind::out_of_range, HasSubstr("tokens[0] is -2"), [&] {
    fake.engine->score(std::vector<TokenId>{-2, 1});
  });
}

TEST(Logits, AreThoseOfEveryPosition) {
  const FakeEngine fake = fake_engine(hashed_logits());
  for (const std::size_t count : {1u, 4u, 11u}) {
    const std::vector<TokenId> tokens = random_tokens(count, 8);
    std::vector<float> logits(count * kVocabSize);
    fake.engine->logits(tokens, logits);
    for (std::size_t i = 0; i < count; ++i) {
      const std::vector<float> expected = hashed_logits()(std::span(tokens).first(i + 1));
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), logits.begin() + i * kVocabSize));
    }
  }
}

TEST(Logits, RefuseWrongSizes) {
  const FakeEngine fake = fake_engine(hashed_logits());
  std::vector<float> logits(2 * kVocabSize);
  const ErrorKind kind = ErrorKind::invalid_argument;
  expect_error(kind, HasSubstr("at least 1 token"), [&] { fake.engine->logits({}, {}); });
  expect_error(kind, HasSubstr("room for 3 x 320 (tokens x vocab_size) values, got 640"), [&] {
    fake.engine->logits(std::vector<TokenId>{1, 2, 3}, logits);
  });
  expect_error(kind, HasSubstr("there are 65 tokens"),
               [&] { fake.engine->logits(random_tokens(65, 9), logits); });
  expect_error(ErrorKind::out_of_range, HasSubstr("tokens[1] is 320"), [&] {
    fake.engine->logits(std::vector<TokenId>{1, 320}, logits);
  });
}

TEST(Scoring, ErrorsLeaveNoSequence) {
  const FakeEngine fake = fake_engine(hashed_logits(), [](FakeState& state) {
    state.before_step = [] { throw Error(ErrorKind::internal, "the device is gone"); };
  });
  const std::vector<TokenId> tokens = random_tokens(20, 10);
  std::vector<float> logits(20 * kVocabSize);
  expect_error(ErrorKind::internal, HasSubstr("gone"), [&] { fake.engine->score(tokens); });
  expect_error(ErrorKind::internal, HasSubstr("gone"),
               [&] { fake.engine->logits(tokens, logits); });
  expect_error(ErrorKind::internal, HasSubstr("gone"),
               [&] { fake.engine->perplexity(tokens, 0, {}); });
  EXPECT_THAT(fake.state->live, IsEmpty());
}

}  // namespace
}  // namespace clusterfusion
