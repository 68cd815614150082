#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::HasSubstr;
using testing::IsEmpty;

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
  for (const std::size_t count : {2u, 4u, 5u, 6u, 64u, 65u}) {  // the last token is not fed
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
               HasSubstr("there are 66 tokens, and a context of 64 positions scores at most 65; "
                         "score a shorter text, or measure perplexity"),
               [&] { fake.engine->score(random_tokens(66, 7)); });
  expect_error(ErrorKind::out_of_range, HasSubstr("tokens[0] is -2"), [&] {
    fake.engine->score(std::vector<TokenId>{-2, 1});
  });
}

TEST(Score, OfSeveralTextsIsThatOfEach) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<std::vector<TokenId>> texts = {random_tokens(7, 1), random_tokens(2, 2)};
  const std::vector<ScoreResult> results = fake.engine->score(texts);
  ASSERT_EQ(results.size(), 2u);
  for (std::size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(results[i].tokens, texts[i]);
    EXPECT_EQ(results[i].logprobs, fake.engine->score(std::span(texts[i])).logprobs);
  }
  const std::vector<std::vector<TokenId>> wrong = {texts[0], {1}};
  fake.state->prefill_sizes.clear();
  expect_error(ErrorKind::invalid_argument, HasSubstr("texts[1]: a score needs at least 2 tokens"),
               [&] { fake.engine->score(wrong); });
  EXPECT_THAT(fake.state->prefill_sizes, IsEmpty()) << "computed before all was checked";
}

// The tokens in the order of their logits after `context`, the largest first.
std::vector<TokenId> ranked_tokens(std::span<const TokenId> context) {
  const std::vector<float> logits = hashed_logits()(context);
  std::vector<TokenId> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::ranges::stable_sort(ids, std::ranges::greater(), [&](TokenId id) { return logits[id]; });
  return ids;
}

TEST(Loglikelihood, IsThatOfTheContinuationsTokens) {
  const FakeEngine fake = fake_engine(hashed_logits());
  std::vector<LoglikelihoodRequest> requests;
  for (const auto& [context, continuation] :
       {std::pair{1, 1}, {1, 6}, {4, 1}, {5, 4}, {9, 7}, {1, 64}, {64, 1}, {30, 35}}) {
    requests.push_back({random_tokens(context, 1), random_tokens(continuation, 2)});
  }
  const std::vector<LoglikelihoodResult> results =
      fake.engine->loglikelihood(requests, {.num_top = 3});
  ASSERT_EQ(results.size(), requests.size());
  for (std::size_t r = 0; r < results.size(); ++r) {
    std::vector<TokenId> text = requests[r].context;
    double total = 0;
    ASSERT_EQ(results[r].tokens.size(), requests[r].continuation.size());
    for (std::size_t i = 0; i < results[r].tokens.size(); ++i) {
      const ScoredToken& scored = results[r].tokens[i];
      EXPECT_EQ(scored.token, requests[r].continuation[i]);
      EXPECT_NEAR(scored.logprob, -negative_log_likelihood(text, scored.token), 1e-5);
      const std::vector<TokenId> ranked = ranked_tokens(text);
      EXPECT_EQ(scored.is_likeliest, scored.token == ranked[0]);
      ASSERT_EQ(scored.top.size(), 3u);
      for (std::size_t k = 0; k < 3; ++k) {
        EXPECT_EQ(scored.top[k].token, ranked[k]);
        EXPECT_NEAR(scored.top[k].logprob, -negative_log_likelihood(text, ranked[k]), 1e-5);
      }
      total += scored.logprob;
      text.push_back(scored.token);
    }
    EXPECT_DOUBLE_EQ(results[r].total, total);
  }
  EXPECT_THAT(fake.state->live, IsEmpty());
}

TEST(Loglikelihood, KnowsWhatGreedyDecodingGives) {
  const FakeEngine fake = fake_engine(hashed_logits());
  GenerateRequest request;
  request.prompt_tokens = random_tokens(5, 3);
  request.max_new_tokens = 8;
  request.ignore_eos = true;
  request.allow_padded_ids = true;
  const std::vector<TokenId> greedy = fake.engine->generate(request).tokens;
  std::vector<LoglikelihoodRequest> requests(1 + greedy.size(), {request.prompt_tokens, greedy});
  for (std::size_t i = 0; i < greedy.size(); ++i) {
    requests[1 + i].continuation[i] = (greedy[i] + 1) % kVocabSize;
  }
  const std::vector<LoglikelihoodResult> results = fake.engine->loglikelihood(requests, {});
  EXPECT_TRUE(results[0].is_greedy);
  for (std::size_t i = 0; i < greedy.size(); ++i) {
    EXPECT_FALSE(results[1 + i].is_greedy) << i;
    EXPECT_THAT(results[1 + i].tokens[i].top, IsEmpty());
    EXPECT_FALSE(results[1 + i].tokens[i].is_likeliest);
  }
}

TEST(Loglikelihood, ReportsProgressAndCanBeCancelled) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const std::vector<LoglikelihoodRequest> requests(5, {{1}, {2, 3}});
  std::vector<std::int64_t> done;
  LoglikelihoodOptions options;
  options.progress = [&](std::int64_t count, std::int64_t total) {
    EXPECT_EQ(total, 5);
    done.push_back(count);
    return count < 3;
  };
  EXPECT_EQ(fake.engine->loglikelihood(requests, options).size(), 3u);
  EXPECT_THAT(done, testing::ElementsAre(1, 2, 3));
  EXPECT_THAT(fake.engine->loglikelihood({}, {}), IsEmpty());
}

void use_passes_of_512(FakeState& state) { state.info.prefill_chunk = 512; }

TEST(Scoring, TextsSharePasses) {
  const FakeEngine plain = fake_engine(hashed_logits());
  const FakeEngine packed = fake_engine(hashed_logits(), use_passes_of_512);
  std::vector<std::vector<TokenId>> texts;
  std::vector<LoglikelihoodRequest> requests;
  for (unsigned i = 0; i < 60; ++i) {
    const int length = i == 20 ? 65 : 2 + static_cast<int>(i * 7919 % 11);
    texts.push_back(random_tokens(static_cast<std::size_t>(length), i));
    requests.push_back({random_tokens(1 + i * 31 % 20, i), random_tokens(1 + i * 17 % 9, 100 + i)});
  }
  std::size_t most_live = 0;
  packed.state->before_step = [&] { most_live = std::max(most_live, packed.state->live.size()); };
  const std::vector<ScoreResult> scores = packed.engine->score(texts);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(scores[i].tokens, texts[i]);
    EXPECT_EQ(scores[i].logprobs, plain.engine->score(std::span(texts[i])).logprobs) << i;
  }
  EXPECT_LT(packed.state->prefill_passes.size(), 8u);
  EXPECT_EQ(most_live, 16u) << "each has a page, though it fills little of it";

  const auto expected = plain.engine->loglikelihood(requests, {.num_top = 2});
  std::vector<std::int64_t> done;
  LoglikelihoodOptions options{.num_top = 2};
  options.progress = [&](std::int64_t count, std::int64_t) {
    done.push_back(count);
    return count < 50;
  };
  const auto found = packed.engine->loglikelihood(requests, options);
  ASSERT_EQ(found.size(), 50u);
  for (std::size_t i = 0; i < done.size(); ++i) EXPECT_EQ(done[i], static_cast<int>(i) + 1);
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].total, expected[i].total) << i;
    EXPECT_EQ(found[i].is_greedy, expected[i].is_greedy);
    ASSERT_EQ(found[i].tokens.size(), expected[i].tokens.size());
    for (std::size_t t = 0; t < found[i].tokens.size(); ++t) {
      EXPECT_EQ(found[i].tokens[t].token, expected[i].tokens[t].token);
      EXPECT_EQ(found[i].tokens[t].top[1].logprob, expected[i].tokens[t].top[1].logprob);
    }
  }
  EXPECT_THAT(packed.state->live, IsEmpty());
}

TEST(Loglikelihood, RefusesWhatItCannotScore) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const auto score = [&](std::vector<TokenId> context, std::vector<TokenId> continuation) {
    return [&fake, request = LoglikelihoodRequest{std::move(context), std::move(continuation)}] {
      fake.engine->loglikelihood(std::vector<LoglikelihoodRequest>{{{1}, {2}}, request}, {});
    };
  };
  const ErrorKind kind = ErrorKind::invalid_argument;
  expect_error(kind, HasSubstr("requests[1]: the context has no tokens"), score({}, {1}));
  expect_error(kind, HasSubstr("requests[1]: the continuation has no tokens"), score({1}, {}));
  expect_error(kind, HasSubstr("there are 66 tokens, and a context of 64"),
               score(random_tokens(60, 1), random_tokens(6, 1)));
  expect_error(ErrorKind::out_of_range, HasSubstr("requests[1]: context[1] is 320"),
               score({1, 320}, {1}));
  expect_error(ErrorKind::out_of_range, HasSubstr("requests[1]: continuation[0] is -1"),
               score({1}, {-1}));
  EXPECT_THAT(fake.state->prefill_sizes, IsEmpty());
  for (const std::int32_t num_top : {-1, 101}) {
    expect_error(kind, HasSubstr("num_top must be in [0, 100]"),
                 [&] { fake.engine->loglikelihood({}, {.num_top = num_top}); });
  }
}

TEST(EncodePair, DividesTheWholeTextBehindTheContext) {
  const FakeEngine fake = fake_engine(hashed_logits());
  const auto pair = [&](std::string_view context, std::string_view continuation) {
    const LoglikelihoodRequest tokens = fake.engine->encode_pair(context, continuation);
    return std::pair(tokens.context, tokens.continuation);
  };
  const auto bytes = bytes_to_tokens;
  EXPECT_EQ(pair("ab", "xy"), std::pair(bytes("ab"), bytes("xy")));
  // White space goes over.
  EXPECT_EQ(pair("ab ", "xy"), std::pair(bytes("ab"), bytes(" xy")));
  EXPECT_EQ(pair("ab\xE3\x80\x80\x1C", "x"), std::pair(bytes("ab"), bytes("\xE3\x80\x80\x1Cx")));
  // The whole begins with one token, the end of text, where the context alone has seven.
  expect_error(ErrorKind::invalid_argument, HasSubstr("the continuation has no token of its own"),
               [&] { pair("<|endof", "text|>123456"); });
  EXPECT_EQ(pair("<|endof", "text|>12345678"), std::pair(bytes("<|endof"), bytes("78")));
}

TEST(EncodePair, PutsTheFirstTokenInPlaceOfAnEmptyContext) {
  const FakeEngine fake = fake_engine(hashed_logits());
  LoglikelihoodRequest pair = fake.engine->encode_pair("", "xy");
  EXPECT_THAT(pair.context, testing::ElementsAre(kEndOfText));
  EXPECT_EQ(pair.continuation, bytes_to_tokens("xy"));
  pair = fake.engine->encode_pair("", "<|endoftext|>xy");
  EXPECT_THAT(pair.context, testing::ElementsAre(kEndOfText));
  EXPECT_EQ(pair.continuation, bytes_to_tokens("xy"));
  const ErrorKind kind = ErrorKind::invalid_argument;
  expect_error(kind, HasSubstr("the continuation has no token"),
               [&] { fake.engine->encode_pair("", ""); });
  expect_error(kind, HasSubstr("the continuation has no token"),
               [&] { fake.engine->encode_pair("", "<|endoftext|>"); });
  expect_error(kind, HasSubstr("the context has no token besides white space"),
               [&] { fake.engine->encode_pair(" \n", "x"); });
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
