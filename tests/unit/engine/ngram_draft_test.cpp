// N-grams against a search through the whole text.
#include "engine/ngram_draft.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <vector>

namespace clusterfusion {
namespace {

// How many tokens up to `end` are the text's last.
std::int64_t match_length(const std::vector<TokenId>& text, std::int64_t end) {
  std::int64_t length = 0;
  while (length <= end && text[static_cast<std::size_t>(end - length)] ==
                              text[text.size() - 1 - static_cast<std::size_t>(length)]) {
    ++length;
  }
  return length;
}

// `variety`: of tokens; few give long matches.
std::vector<TokenId> random_text(std::mt19937& random, std::size_t size, unsigned variety) {
  std::vector<TokenId> text;
  while (text.size() < size) {
    if (!text.empty() && random() % 10 == 0) {  // says a part again
      const std::size_t from = random() % text.size();
      const std::size_t count = std::min<std::size_t>(random() % 40, text.size() - from);
      for (std::size_t i = 0; i < count; ++i) text.push_back(text[from + i]);
    }
    text.push_back(static_cast<TokenId>(random() % variety));
  }
  return text;
}

TEST(NgramIndex, FindsTheLastPlaceOfTheLongestSuffix) {
  std::mt19937 random(3);
  for (const unsigned variety : {1u, 2u, 3u, 10u, 200u, 60000u}) {
    const std::vector<TokenId> text = random_text(random, 700, variety);
    NgramIndex index;
    std::vector<TokenId> so_far;
    for (const TokenId token : text) {
      index.append(token);
      so_far.push_back(token);
      std::int64_t longest = 0, last = -1;
      for (std::int64_t end = 0; end + 1 < std::ssize(so_far); ++end) {
        const std::int64_t length =
            std::min<std::int64_t>(match_length(so_far, end), NgramIndex::kLongest);
        if (length > 0 && length >= longest) {
          longest = length;
          last = end;
        }
      }
      const NgramIndex::Match match = index.find();
      ASSERT_EQ(std::min<std::int64_t>(match.length, NgramIndex::kLongest), longest);
      if (longest == 0) continue;
      // Among places of the longest n-grams it may choose one that goes back further.
      if (longest < NgramIndex::kLongest) {
        ASSERT_EQ(match.next, last + 1);
      } else {
        const std::int64_t ours = match_length(so_far, match.next - 1);
        ASSERT_GE(std::min<std::int64_t>(ours, 64),
                  std::min<std::int64_t>(match_length(so_far, last), 64));
        ASSERT_EQ(match.length, std::min<std::int64_t>(ours, 64));
      }
    }
  }
}

TEST(NgramIndex, PrefersThePlaceThatGoesBackFurther) {
  NgramIndex index;
  const std::vector<TokenId> phrase{1, 2, 3, 4, 5, 6, 7, 8};
  const auto say = [&](TokenId before, TokenId after) {
    index.append(before);
    for (const TokenId token : phrase) index.append(token);
    if (after >= 0) index.append(after);
  };
  say(20, 30);
  say(21, 31);
  say(20, -1);
  EXPECT_EQ(index.following(index.find(), 1), std::vector<TokenId>{30});
}

TEST(NgramIndex, GoesOnWithWhatItProposes) {
  NgramIndex index;
  for (const TokenId token : {9, 1, 2, 1, 2}) index.append(token);
  EXPECT_EQ(index.following(index.find(), 5), (std::vector<TokenId>{1, 2, 1, 2, 1}));
}

TEST(NgramDraft, ProposesNothingForWhatIsNew) {
  NgramDraft draft;
  const auto text = draft.begin({});
  text->append(std::vector<TokenId>{1, 2, 3});
  ASSERT_TRUE(text->read());
  DraftQuery query{text.get(), 4};
  draft.propose({&query, 1});
  EXPECT_TRUE(query.tokens.empty());
  text->append(std::vector<TokenId>{2});
  ASSERT_TRUE(text->read());
  draft.propose({&query, 1});
  EXPECT_EQ(query.tokens, (std::vector<TokenId>{3, 2, 3, 2}));
}

// Certainty grows with the match.
TEST(NgramDraft, SaysHowSureItIs) {
  NgramDraft draft;
  for (const auto& [length, certainty] :
       std::vector<std::pair<int, int>>{{1, 0}, {2, 1}, {3, 1}, {4, 2}, {7, 2}, {8, 3}, {40, 3}}) {
    const auto text = draft.begin({});
    std::vector<TokenId> tokens;
    for (int i = 0; i < length; ++i) tokens.push_back(i);
    tokens.push_back(1000);
    for (int i = 0; i < length; ++i) tokens.push_back(i);
    text->append(tokens);
    ASSERT_TRUE(text->read());
    DraftQuery query{text.get(), 1};
    draft.propose({&query, 1});
    EXPECT_EQ(query.tokens, std::vector<TokenId>{1000});
    EXPECT_EQ(query.certainty, certainty) << length;
  }
}

// A long prompt is read in parts.
TEST(NgramDraft, LetsNobodyWait) {
  NgramDraft draft;
  const auto text = draft.begin({});
  text->append(std::vector<TokenId>(20000, 5));
  int parts = 1;
  while (!text->read()) ++parts;
  EXPECT_GE(parts, 4);
  EXPECT_LE(parts, 10);
}

}  // namespace
}  // namespace clusterfusion
