// Drafts whose proposals a benchmark sets between its texts.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/draft.hpp"
#include "support/test_drafts.hpp"

namespace clusterfusion::benchmark {

// Another draft, of whose proposals only the first are taken.
class LimitedDraft final : public Draft {
 public:
  explicit LimitedDraft(std::unique_ptr<Draft> draft) : draft_(std::move(draft)) {}

  // From the next step on.
  void limit(std::int32_t most) { most_ = most; }

  std::string name() const override { return draft_->name(); }
  std::unique_ptr<DraftText> begin(const SamplingParams& sampling) override {
    return draft_->begin(sampling);
  }
  void propose(std::span<DraftQuery> queries) override {
    for (DraftQuery& query : queries) query.most = std::min(query.most, most_.load());
    draft_->propose(queries);
  }
  bool is_cheap() const override { return draft_->is_cheap(); }
  double seconds_per_token() const override { return draft_->seconds_per_token(); }

 private:
  std::unique_ptr<Draft> draft_;
  std::atomic<std::int32_t> most_ = 1;
};

// One that knows a text and says each token right with one of some chances.
class SharesDraft final : public Draft {
 public:
  SharesDraft(const std::vector<double>& shares, std::int64_t vocab_size,
              const std::vector<TokenId>& text)
      : shares_(shares) {
    for (const double share : shares) {
      drafts_.push_back(std::make_unique<test::KnowingDraft>(share, vocab_size, 5));
      drafts_.back()->tell(text);
    }
  }

  // From the next step on; one of the shares.
  void use(double share) {
    used_ = static_cast<std::size_t>(std::ranges::find(shares_, share) - shares_.begin());
  }

  std::string name() const override { return drafts_.front()->name(); }
  std::unique_ptr<DraftText> begin(const SamplingParams& sampling) override {
    return drafts_.front()->begin(sampling);
  }
  void propose(std::span<DraftQuery> queries) override { drafts_.at(used_)->propose(queries); }
  bool is_cheap() const override { return true; }

 private:
  std::vector<double> shares_;
  std::vector<std::unique_ptr<test::KnowingDraft>> drafts_;
  std::atomic<std::size_t> used_ = 0;
};

}  // namespace clusterfusion::benchmark
