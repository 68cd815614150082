// The same bits however a text is cut, batched, threaded or cached.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "sampling/sampler.hpp"
#include "sequences.hpp"
#include "support/random_model.hpp"
#include "targets.hpp"

namespace clusterfusion::test {
namespace {

enum class Layout { gpt_neox, llama };

class Equality : public testing::TestWithParam<Layout> {
 protected:
  static constexpr std::size_t kTokens = 200;

  Equality() {
    config_ = GetParam() == Layout::llama ? small_llama_config() : odd_gpt_neox_config();
    model_ = make_random_model(config_);
    backend_ = make_cpu_backend(model_, {});
    tokens_ = random_tokens(config_, kTokens, 5);
    want_ = all_logits(*backend_, config_, tokens_);
  }

  static ModelConfig odd_gpt_neox_config() {
    ModelConfig config = small_config();
    config.hidden_size = 120;  // neither it nor the heads fill whole vectors
    config.num_heads = 3;
    config.head_dim = 40;
    config.rotary_dim = 10;
    config.intermediate_size = 250;
    config.num_layers = 3;
    return config;
  }

  std::vector<float> row(std::size_t position) const {
    const auto vocab = static_cast<std::ptrdiff_t>(config_.vocab_size);
    const auto from = want_.begin() + static_cast<std::ptrdiff_t>(position) * vocab;
    return {from, from + vocab};
  }

  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
  std::vector<TokenId> tokens_;
  std::vector<float> want_;
};

INSTANTIATE_TEST_SUITE_P(Layouts, Equality, testing::Values(Layout::gpt_neox, Layout::llama),
                         [](const auto& layout) {
                           return layout.param == Layout::llama ? "Llama" : "GptNeox";
                         });

TEST_P(Equality, OneByOne) {
  for (const std::int64_t target : usable_targets()) {
    const UseTarget use(target);
    const std::vector<float> want = all_logits(*backend_, config_, tokens_);
    const SequenceId id = backend_->create_sequence({});
    const auto vocab = static_cast<std::ptrdiff_t>(config_.vocab_size);
    for (std::size_t t = 0; t < kTokens; ++t) {
      const std::vector<float> got = decode_logits(*backend_, config_, id, tokens_[t]);
      const auto from = want.begin() + static_cast<std::ptrdiff_t>(t) * vocab;
      ASSERT_TRUE(std::equal(got.begin(), got.end(), from))
          << "position " << t << ", " << hwy::TargetName(target);
    }
    backend_->release_sequence(id);
  }
}

TEST_P(Equality, Pieces) {
  for (const std::size_t piece : {1, 2, 3, 4, 5, 7, 16, 17, 31, 63, 64, 65, 127, 199}) {
    const SequenceId id = backend_->create_sequence({});
    std::vector<float> got;
    for (std::size_t at = 0; at < kTokens; at += piece) {
      const auto part = std::span(tokens_).subspan(at, std::min(piece, kTokens - at));
      const std::vector<float> logits = prefill_logits(*backend_, config_, id, part);
      got.insert(got.end(), logits.begin(), logits.end());
    }
    EXPECT_EQ(got, want_) << "pieces of " << piece;
    backend_->release_sequence(id);
  }
}

TEST_P(Equality, Threads) {
  for (const int threads : {1, 2, 3, 7}) {
    BackendOptions options;
    options.threads = threads;
    const auto other = make_cpu_backend(model_, options);
    EXPECT_EQ(all_logits(*other, config_, tokens_), want_) << threads << " threads";
    const SequenceId id = other->create_sequence({});
    other->prefill(id, std::span(tokens_).first(150), {});
    EXPECT_EQ(decode_logits(*other, config_, id, tokens_[150]), row(150)) << threads;
  }
}

// Sequences of unlike lengths, in batches of every size that the kernels treat differently.
TEST_P(Equality, Batches) {
  for (const std::size_t batch : {1, 2, 3, 4, 5, 8, 33, 40}) {
    std::vector<SequenceId> ids;
    std::vector<TokenId> inputs;
    for (std::size_t b = 0; b < batch; ++b) {
      const std::size_t length = 1 + b * 37 % (kTokens - 2);
      ids.push_back(backend_->create_sequence({}));
      backend_->prefill(ids[b], std::span(tokens_).first(length), {});
      inputs.push_back(tokens_[length]);
    }
    std::vector<float> logits(batch * static_cast<std::size_t>(config_.vocab_size));
    backend_->decode(ids, inputs, 1, {}, logits);
    for (std::size_t b = 0; b < batch; ++b) {
      const auto from = logits.begin() + static_cast<std::ptrdiff_t>(b) * config_.vocab_size;
      const std::vector<float> got(from, from + config_.vocab_size);
      EXPECT_EQ(got, row(1 + b * 37 % (kTokens - 2))) << "member " << b << " of " << batch;
      backend_->release_sequence(ids[b]);
    }
  }
}

TEST_P(Equality, NarrowKvCache) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    BackendOptions options;
    options.kv_dtype = dtype;
    const auto narrow = make_cpu_backend(model_, options);
    const std::vector<float> want = all_logits(*narrow, config_, tokens_);
    const SequenceId id = narrow->create_sequence({});
    narrow->prefill(id, std::span(tokens_).first(100), {});
    const std::vector<float> got =
        prefill_logits(*narrow, config_, id, std::span(tokens_).subspan(100));
    EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin() + 100 * config_.vocab_size));
  }
}

TEST_P(Equality, TruncateForgets) {
  const SequenceId id = backend_->create_sequence({});
  const auto other = random_tokens(config_, 150, 99);
  backend_->prefill(id, std::span(tokens_).first(70), {});
  backend_->prefill(id, other, {});
  EXPECT_EQ(backend_->length(id), 220);
  for (const std::size_t length : {70, 64, 63, 1, 0}) {
    backend_->truncate(id, static_cast<std::int64_t>(length));
    EXPECT_EQ(backend_->length(id), static_cast<std::int64_t>(length));
    const auto rest = std::span(tokens_).subspan(length);
    const std::vector<float> got = prefill_logits(*backend_, config_, id, rest);
    const auto from = want_.begin() + static_cast<std::ptrdiff_t>(length) * config_.vocab_size;
    EXPECT_TRUE(std::equal(got.begin(), got.end(), from)) << "truncated to " << length;
  }
}

// Pages go from sequence to sequence; what the last one left there must never show.
TEST_P(Equality, ReusedPagesShowNothing) {
  for (int round = 0; round < 4; ++round) {
    std::vector<SequenceId> ids;
    for (unsigned s = 0; s < 3; ++s) {
      ids.push_back(backend_->create_sequence({}));
      backend_->prefill(ids.back(), random_tokens(config_, 64 + 50 * s, s), {});
    }
    backend_->release_sequence(ids[static_cast<std::size_t>(round) % 3]);
    EXPECT_EQ(all_logits(*backend_, config_, tokens_), want_);
    for (std::size_t s = 0; s < 3; ++s) {
      if (s != static_cast<std::size_t>(round) % 3) backend_->release_sequence(ids[s]);
    }
  }
}

TEST_P(Equality, EveryOutputOfAPrefillAgrees) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  std::vector<TokenId> targets(kTokens);
  for (std::size_t i = 0; i + 1 < kTokens; ++i) targets[i] = tokens_[i + 1];
  for (std::size_t i = 0; i + 1 < kTokens; i += 3) targets[i] = likeliest_token(row(i));
  targets[17] = targets[kTokens - 1] = -1;
  std::vector<std::uint8_t> is_likeliest(kTokens, 2);
  std::vector<float> with_all(kTokens, 1.0f), alone(kTokens, 1.0f), all(kTokens * vocab);
  std::vector<float> last(vocab);
  SampledToken sampled;
  for (const bool wants_all : {false, true}) {
    const SequenceId id = backend_->create_sequence({});
    PrefillOutput output;
    if (wants_all) output.all_logits = all;
    output.last_logits = last;
    output.targets = targets;
    output.target_logprobs = wants_all ? with_all : alone;
    output.target_is_likeliest = is_likeliest;
    output.sampled = &sampled;
    backend_->prefill(id, tokens_, output);
    EXPECT_EQ(last, row(kTokens - 1));
    const auto best = std::max_element(last.begin(), last.end()) - last.begin();
    EXPECT_EQ(sampled.token, best);
  }
  EXPECT_EQ(all, want_);
  EXPECT_EQ(alone, with_all);
  EXPECT_EQ(alone[17], 1.0f) << "a target of -1 is left alone";
  EXPECT_EQ(is_likeliest[17], 2) << "a target of -1 is left alone";
  for (std::size_t i = 0; i < kTokens; ++i) {
    if (targets[i] == -1) continue;
    EXPECT_EQ(is_likeliest[i], targets[i] == likeliest_token(row(i)) ? 1 : 0);
    double sum = 0;
    for (const float logit : row(i)) sum += std::exp(static_cast<double>(logit));
    const double want = row(i)[static_cast<std::size_t>(targets[i])] - std::log(sum);
    EXPECT_NEAR(alone[i], want, 1e-5);
  }
}

// Pieces of several sequences in one pass, each with the bits that it has alone.
TEST_P(Equality, PiecesTogether) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  // Each sequence is the beginning of the text; pieces begin and end anywhere.
  struct Case {
    std::size_t begin, end;
    bool all, last, targets;
  };
  const std::vector<Case> cases = {{0, 1, false, true, false},   {7, 7 + 64, false, false, true},
                                   {0, 130, true, true, false},  {63, 66, false, false, false},
                                   {199, 200, true, true, true}, {20, 61, true, false, true}};
  for (int threads : {1, 3}) {
    BackendOptions options;
    options.threads = threads;
    const auto backend = make_cpu_backend(model_, options);
    std::vector<PrefillPart> parts;
    std::vector<std::vector<float>> all, last, logprobs;
    std::vector<std::vector<TokenId>> targets;
    std::vector<SampledToken> sampled(cases.size());
    for (std::size_t c = 0; c < cases.size(); ++c) {
      const auto [begin, end, wants_all, wants_last, wants_targets] = cases[c];
      const SequenceId id = backend->create_sequence({});
      if (begin > 0) backend->prefill(id, std::span(tokens_).first(begin), {});
      all.emplace_back(wants_all ? (end - begin) * vocab : 0);
      last.emplace_back(wants_last ? vocab : 0);
      targets.emplace_back(wants_targets ? end - begin : 0, 5);
      logprobs.emplace_back(targets.back().size());
      if (wants_targets) targets.back()[0] = -1;
      parts.push_back({id, std::span(tokens_).subspan(begin, end - begin), {}});
      parts.back().output.sampled = wants_last ? &sampled[c] : nullptr;
    }
    for (std::size_t c = 0; c < cases.size(); ++c) {
      parts[c].output.all_logits = all[c];
      parts[c].output.last_logits = last[c];
      parts[c].output.targets = targets[c];
      parts[c].output.target_logprobs = logprobs[c];
    }
    backend->prefill_together(parts);
    for (std::size_t c = 0; c < cases.size(); ++c) {
      SCOPED_TRACE(testing::Message() << "part " << c << ", " << threads << " threads");
      const auto [begin, end, wants_all, wants_last, wants_targets] = cases[c];
      EXPECT_EQ(backend->length(parts[c].sequence), static_cast<std::int64_t>(end));
      if (wants_all) {
        EXPECT_TRUE(std::ranges::equal(
            all[c], std::span(want_).subspan(begin * vocab, (end - begin) * vocab)));
      }
      if (wants_last) {
        EXPECT_EQ(last[c], row(end - 1));
        EXPECT_EQ(sampled[c].token, likeliest_token(row(end - 1)));
      }
      for (std::size_t i = 1; i < targets[c].size(); ++i) {
        EXPECT_EQ(logprobs[c][i], score_target(row(begin + i), 5).logprob);
      }
      if (end == kTokens) continue;
      EXPECT_EQ(decode_logits(*backend, config_, parts[c].sequence, tokens_[end]), row(end));
    }
  }
}

TEST_P(Equality, PiecesTogetherAreCheckedAndUndone) {
  const SequenceId first = backend_->create_sequence({});
  const SequenceId second = backend_->create_sequence({});
  backend_->prefill(second, std::span(tokens_).first(10), {});
  const std::vector<TokenId> outside = {1, -1};
  const auto expect_refused = [&](const std::vector<PrefillPart>& parts) {
    EXPECT_THROW(backend_->prefill_together(parts), Error);
    EXPECT_EQ(backend_->length(first), 0);
    EXPECT_EQ(backend_->length(second), 10);
  };
  const std::span<const TokenId> piece = std::span(tokens_).subspan(10, 5);
  expect_refused({{second, piece}, {first, outside}});
  expect_refused({{second, piece}, {second, piece}});
  expect_refused({{second, piece}, {first, {}}});
  const std::vector<TokenId> many(static_cast<std::size_t>(backend_->info().prefill_chunk), 3);
  expect_refused({{second, piece}, {first, many}});
  backend_->set_stop_request([] { return true; });
  EXPECT_THROW(
      backend_->prefill_together(std::vector<PrefillPart>{{second, piece}, {first, piece}}),
      Stopped);
  backend_->set_stop_request({});
  EXPECT_EQ(backend_->length(first), 0);
  EXPECT_EQ(backend_->length(second), 10);
  backend_->prefill_together(std::vector<PrefillPart>{{second, piece}, {first, piece}});
  EXPECT_EQ(decode_logits(*backend_, config_, second, tokens_[15]), row(15));
}

}  // namespace
}  // namespace clusterfusion::test
