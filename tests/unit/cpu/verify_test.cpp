// Proposals that are verified on the CPU: what is chosen, and the keys and values left behind, are
// the bits of single steps, and of a prefill.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>

#include "backend/cpu/kernels.hpp"
#include "base/fail.hpp"
#include "sequences.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

// Of the Llama layout, or GPT-NeoX.
class CpuVerify : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::size_t kSteps = 90;

  CpuVerify()
      : config_(GetParam() ? small_llama_config() : small_config()),
        model_(make_random_model(config_)) {
    options_.threads = 2;
    backend_ = make_cpu_backend(model_, options_);
  }

  // A text's choices by single steps behind `prompt`, whose last token is the first input.
  std::vector<SampledToken> by_steps(std::span<const TokenId> prompt,
                                     const SamplingParams& sampling) {
    const SequenceId id = begin(prompt, sampling);
    std::vector<SampledToken> steps;
    TokenId input = prompt.back();
    for (std::size_t i = 0; i < kSteps; ++i) {
      SampledToken sampled;
      backend_->decode({&id, 1}, {&input, 1}, 1, {&sampled, 1}, {});
      input = sampled.token;
      steps.push_back(std::move(sampled));
    }
    backend_->release_sequence(id);
    return steps;
  }
  SequenceId begin(std::span<const TokenId> prompt, const SamplingParams& sampling) {
    const SequenceId id = backend_->create_sequence(sampling);
    backend_->prefill(id, prompt.first(prompt.size() - 1), {});
    return id;
  }

  // What page `index` holds of the sequence's first `length` positions, value by value.
  std::vector<float> page_of(SequenceId id, std::int64_t index, std::int64_t length) {
    const KvPageId held = backend_->hold_page(id, index);
    const auto* page = reinterpret_cast<const float*>(held);
    const std::int64_t padded = cpu::padded(config_.head_dim);
    const std::int64_t keys = config_.head_dim * kKvPagePositions;
    const std::int64_t positions = std::min(kKvPagePositions, length - index * kKvPagePositions);
    std::vector<float> values;
    for (std::int64_t head = 0; head < config_.num_layers * config_.kv_heads(); ++head) {
      const float* of_head = page + head * (keys + padded * kKvPagePositions);
      for (std::int64_t p = 0; p < positions; ++p) {
        for (std::int64_t d = 0; d < config_.head_dim; ++d) {
          values.push_back(of_head[d * kKvPagePositions + p]);
          values.push_back(of_head[keys + p * padded + d]);
        }
      }
    }
    backend_->drop_page(held);
    return values;
  }

  void expect_cache_of_prefill(SequenceId id, std::span<const TokenId> tokens) {
    const SequenceId fresh = backend_->create_sequence({});
    backend_->prefill(fresh, tokens, {});
    const std::int64_t length = std::ssize(tokens);
    ASSERT_EQ(backend_->length(id), length);
    for (std::int64_t page = 0; page < kv_pages_of(length); ++page) {
      const std::vector<float> ours = page_of(id, page, length);
      const std::vector<float> theirs = page_of(fresh, page, length);
      ASSERT_EQ(ours.size(), theirs.size());
      ASSERT_EQ(std::memcmp(ours.data(), theirs.data(), ours.size() * sizeof(float)), 0)
          << "page " << page << " of " << length << " positions";
    }
    backend_->release_sequence(fresh);
  }

  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  BackendOptions options_;
  std::unique_ptr<Backend> backend_;
  std::mt19937 random_{7};
};

SamplingParams sampling_of(int kind) {
  SamplingParams sampling;
  if (kind == 0) return sampling;
  sampling = {.temperature = 0.9f, .seed = static_cast<std::uint64_t>(kind), .num_logprobs = 2};
  if (kind % 2 == 0) sampling.top_k = 5;
  if (kind % 3 == 0) sampling.repetition_penalty = 1.2f;
  if (kind % 4 == 0) sampling.no_repeat_ngram_size = 2;
  return sampling;
}

INSTANTIATE_TEST_SUITE_P(Layouts, CpuVerify, testing::Bool(),
                         [](const auto& is_llama) { return is_llama.param ? "Llama" : "GptNeox"; });

TEST_P(CpuVerify, ChoosesAndKeepsWhatSingleStepsDo) {
  for (int round = 0; round < 12; ++round) {
    SCOPED_TRACE(round);
    struct Text {
      SequenceId id;
      std::vector<TokenId> tokens;  // fed
      std::vector<SampledToken> steps;
      std::size_t done = 0;
    };
    std::vector<Text> texts;
    for (int i = 0; i < 1 + round % 4; ++i) {
      const auto prompt = random_tokens(config_, 2 + random_() % 150, random_());
      const SamplingParams sampling = sampling_of(round + i);
      texts.push_back({begin(prompt, sampling), prompt, by_steps(prompt, sampling)});
    }
    for (bool goes_on = true; goes_on;) {
      std::vector<Proposal> batch;
      std::vector<Text*> members;
      for (Text& text : texts) {
        if (text.done == kSteps) continue;
        Proposal proposal{text.id, {text.tokens.back()}};
        const std::size_t most = std::min<std::size_t>(random_() % 20, kSteps - text.done - 1);
        for (std::size_t i = 0; i < most; ++i) {
          const bool is_wrong = random_() % 5 == 0;
          proposal.tokens.push_back(is_wrong ? static_cast<TokenId>(random_() % 301)
                                             : text.steps[text.done + i].token);
        }
        batch.push_back(std::move(proposal));
        members.push_back(&text);
      }
      goes_on = !batch.empty();
      if (!goes_on) break;
      backend_->verify(batch);
      for (std::size_t b = 0; b < batch.size(); ++b) {
        Text& text = *members[b];
        const std::vector<SampledToken>& chosen = batch[b].chosen;
        ASSERT_GE(chosen.size(), 1u);
        // It ends where it disagrees, or has no more.
        if (chosen.size() < batch[b].tokens.size()) {
          ASSERT_NE(chosen.back().token, batch[b].tokens[chosen.size()]);
        }
        for (const SampledToken& token : chosen) {
          const SampledToken& want = text.steps[text.done++];
          ASSERT_EQ(token.token, want.token);
          ASSERT_EQ(token.logprob, want.logprob);
          ASSERT_EQ(token.top.size(), want.top.size());
          text.tokens.push_back(token.token);
        }
        expect_cache_of_prefill(text.id, std::span(text.tokens).first(text.tokens.size() - 1));
      }
    }
    for (const Text& text : texts) backend_->release_sequence(text.id);
  }
}

// A text that may say each token but once: behind a wrong proposal none may be left, and the text
// itself goes on.
TEST_P(CpuVerify, AnErrorBehindTheFirstTokenOnlyEndsTheRun) {
  const std::vector<TokenId> prompt{1, 1};
  const SamplingParams once{.no_repeat_ngram_size = 1, .drawable_vocab_size = 3};
  const SequenceId id = backend_->create_sequence(once);
  backend_->prefill(id, prompt, {});
  SampledToken first, second;
  const SequenceId plain = backend_->create_sequence(once);
  backend_->prefill(plain, prompt, {});
  const TokenId input = 5;
  backend_->decode({&plain, 1}, {&input, 1}, 1, {&first, 1}, {});
  backend_->decode({&plain, 1}, {&first.token, 1}, 1, {&second, 1}, {});
  Proposal proposal{id, {input, first.token, second.token, 7}};
  backend_->verify({&proposal, 1});
  ASSERT_EQ(proposal.chosen.size(), 2u);
  EXPECT_EQ(proposal.chosen[0].token, first.token);
  EXPECT_EQ(proposal.chosen[1].token, second.token);
  EXPECT_EQ(backend_->length(id), 4);
  Proposal last{id, {second.token, 7}};
  EXPECT_THROW(backend_->verify({&last, 1}), Error);
  EXPECT_EQ(backend_->length(id), 4);
}

TEST_P(CpuVerify, RefusesWhatCannotBe) {
  const SequenceId id = backend_->create_sequence({});
  backend_->prefill(id, std::vector<TokenId>{1}, {});
  const auto expect = [&](std::vector<Proposal> batch, ErrorKind kind, const std::string& part) {
    try {
      backend_->verify(batch);
      ADD_FAILURE() << part;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), kind);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    EXPECT_EQ(backend_->length(id), 1);
  };
  constexpr auto kInvalid = ErrorKind::invalid_argument;
  expect({}, kInvalid, "at least one sequence");
  expect({{id, {}}}, kInvalid, "batch[0] must have 1 to 128 tokens, but has 0");
  expect({{id, std::vector<TokenId>(129, 1)}}, kInvalid, "but has 129");
  expect({{id, {1}}, {id, {1}}}, kInvalid, "in this batch already");
  expect({{id, {1, 301}}}, ErrorKind::out_of_range, "proposed tokens[1] is 301");
  expect({{id, {1, -1}}}, ErrorKind::out_of_range, "proposed tokens[1] is -1");
  expect({{77, {1}}}, kInvalid, "no sequence 77");
  backend_->prefill(id, std::vector<TokenId>(500, 1), {});
  Proposal long_one{id, std::vector<TokenId>(12, 1)};
  EXPECT_THROW(backend_->verify({&long_one, 1}), Error);
  EXPECT_EQ(backend_->length(id), 501);
}

// More rows than the backend computes at once.
TEST_P(CpuVerify, TakesBatchesOfAnySize) {
  std::vector<Proposal> batch;
  std::vector<TokenId> want;
  for (int i = 0; i < 40; ++i) {
    const auto prompt = random_tokens(config_, 3, static_cast<unsigned>(i));
    const auto steps = by_steps(prompt, {});
    batch.push_back({begin(prompt, {}), {prompt.back()}});
    for (std::size_t s = 0; s < 9; ++s) batch.back().tokens.push_back(steps[s].token);
    want.push_back(steps[9].token);
  }
  backend_->verify(batch);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    ASSERT_EQ(batch[i].chosen.size(), 10u);
    EXPECT_EQ(batch[i].chosen.back().token, want[i]);
  }
}

}  // namespace
}  // namespace clusterfusion::test
