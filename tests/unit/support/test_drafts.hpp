// Drafts for tests: one that knows what comes, as far as it is told to, and those that lie.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "engine/draft.hpp"

namespace clusterfusion::test {

// Proposes from whole texts that it was told, prompts and all: what follows in one that begins as
// the text does. Each token is right with the chance `share`; else it is another one of the
// vocabulary. Texts that it was not told get random tokens.
class KnowingDraft : public Draft {
 public:
  KnowingDraft(double share, std::int64_t vocab_size, unsigned seed)
      : share_(share), vocab_size_(vocab_size), random_(seed) {}

  void tell(std::vector<TokenId> text) { known_.push_back(std::move(text)); }

  std::string name() const override { return "a test's"; }
  std::unique_ptr<DraftText> begin(const SamplingParams&) override {
    return std::make_unique<Text>();
  }
  void propose(std::span<DraftQuery> queries) override;
  bool is_cheap() const override { return true; }

 private:
  struct Text final : DraftText {
    void append(std::span<const TokenId> more) override {
      tokens.insert(tokens.end(), more.begin(), more.end());
    }
    bool read() override { return true; }
    std::vector<TokenId> tokens;
  };
  TokenId guess(const std::vector<TokenId>* known, std::size_t at);

  double share_;
  std::int64_t vocab_size_;
  std::mt19937 random_;
  std::vector<std::vector<TokenId>> known_;
};

// Proposes what nobody could: ids of no vocabulary, other numbers of them than were asked for.
class LyingDraft final : public Draft {
 public:
  explicit LyingDraft(unsigned seed) : random_(seed), is_cheap_(random_() % 2 == 0) {}
  std::string name() const override { return "a liar"; }
  std::unique_ptr<DraftText> begin(const SamplingParams&) override {
    return std::make_unique<Text>();
  }
  void propose(std::span<DraftQuery> queries) override;
  bool is_cheap() const override { return is_cheap_; }

 private:
  struct Text final : DraftText {
    void append(std::span<const TokenId>) override {}
    bool read() override { return ++reads % 3 != 0; }
    int reads = 0;
  };
  std::mt19937 random_;
  bool is_cheap_;
};

}  // namespace clusterfusion::test
