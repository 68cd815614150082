#include "support/test_drafts.hpp"

#include <algorithm>
#include <limits>

namespace clusterfusion::test {

TokenId KnowingDraft::guess(const std::vector<TokenId>* known, std::size_t at) {
  const auto any = static_cast<TokenId>(random_() % static_cast<unsigned>(vocab_size_));
  if (known == nullptr || at >= known->size()) return any;
  const TokenId right = (*known)[at];
  const bool is_right = std::uniform_real_distribution<>(0, 1)(random_) < share_;
  if (is_right) return right;
  return any == right ? static_cast<TokenId>((right + 1) % vocab_size_) : any;
}

void KnowingDraft::propose(std::span<DraftQuery> queries) {
  for (DraftQuery& query : queries) {
    const std::vector<TokenId>& text = static_cast<const Text&>(*query.text).tokens;
    const auto found = std::ranges::find_if(known_, [&](const std::vector<TokenId>& known) {
      return known.size() > text.size() && std::equal(text.begin(), text.end(), known.begin());
    });
    const std::vector<TokenId>* const known = found == known_.end() ? nullptr : &*found;
    for (std::int32_t i = 0; i < query.most; ++i) {
      query.tokens.push_back(guess(known, text.size() + static_cast<std::size_t>(i)));
    }
  }
}

void LyingDraft::propose(std::span<DraftQuery> queries) {
  for (DraftQuery& query : queries) {
    const std::size_t count = random_() % (2 * static_cast<unsigned>(query.most) + 1);
    for (std::size_t i = 0; i < count; ++i) {
      switch (random_() % 8) {
        case 0: query.tokens.push_back(-1); break;
        case 1: query.tokens.push_back(std::numeric_limits<TokenId>::max()); break;
        case 2: query.tokens.push_back(std::numeric_limits<TokenId>::min()); break;
        default: query.tokens.push_back(static_cast<TokenId>(random_() % 320));
      }
    }
    query.certainty = static_cast<std::int32_t>(random_() % 9) - 2;
  }
}

}  // namespace clusterfusion::test
