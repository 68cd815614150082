#include "tokenizer/bpe.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace clusterfusion {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// Straight from the definition: merge the leftmost pair of the smallest rank until there is none.
std::vector<TokenId> reference(const std::vector<std::string>& tokens,
                               const std::vector<Merge>& merges, const std::string& word) {
  std::map<std::pair<TokenId, TokenId>, std::size_t> ranks;
  for (std::size_t i = 0; i < merges.size(); ++i) ranks[{merges[i].left, merges[i].right}] = i;
  std::vector<TokenId> ids;
  for (const char byte : word) {
    for (std::size_t id = 0; id < tokens.size(); ++id) {
      if (tokens[id] == std::string(1, byte)) ids.push_back(static_cast<TokenId>(id));
    }
  }
  for (;;) {
    std::size_t best = merges.size(), position = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto found = ranks.find({ids[i], ids[i + 1]});
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        position = i;
      }
    }
    if (best == merges.size()) return ids;
    ids[position] = merges[best].result;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(position) + 1);
  }
}

struct RandomModel {
  std::vector<std::string> tokens{"a", "b", "c", "d"};
  std::vector<Merge> merges;
};

// Merges of random pairs of tokens, so that one text can often be reached in several ways.
RandomModel random_model(std::mt19937& random, int num_merges) {
  RandomModel model;
  std::map<std::string, TokenId> ids;
  for (std::size_t id = 0; id < model.tokens.size(); ++id) {
    ids[model.tokens[id]] = static_cast<TokenId>(id);
  }
  std::map<std::pair<TokenId, TokenId>, bool> seen;
  while (static_cast<int>(model.merges.size()) < num_merges) {
    const auto left = static_cast<TokenId>(random() % model.tokens.size());
    const auto right = static_cast<TokenId>(random() % model.tokens.size());
    const std::string joined = model.tokens[left] + model.tokens[right];
    if (joined.size() > 12 || std::exchange(seen[{left, right}], true)) continue;
    const auto [entry, is_new] = ids.emplace(joined, static_cast<TokenId>(model.tokens.size()));
    if (is_new) model.tokens.push_back(joined);
    model.merges.push_back({left, right, entry->second});
  }
  return model;
}

std::vector<TokenId> encode(const Bpe& bpe, std::string_view word) {
  std::vector<TokenId> out;
  bpe.encode(word, out);
  return out;
}

TEST(Bpe, EqualsTheDefinitionOnWordsOfAllLengths) {
  std::mt19937 random(1);
  for (int round = 0; round < 60; ++round) {
    const RandomModel model = random_model(random, 5 + round);
    const Bpe bpe(model.tokens, model.merges, false);
    for (int length = 0; length < 130; ++length) {
      std::string word;
      for (int i = 0; i < length; ++i) word += static_cast<char>('a' + random() % 4);
      ASSERT_EQ(encode(bpe, word), reference(model.tokens, model.merges, word))
          << "round " << round << ": " << word;
    }
    for (const std::string& token : model.tokens) {
      ASSERT_EQ(encode(bpe, token), reference(model.tokens, model.merges, token)) << token;
    }
  }
}

TEST(Bpe, OfEqualPairsTheLaterRankCounts) {
  const Bpe bpe({"a", "b", "c", "ab", "bc"}, {{0, 1, 3}, {1, 2, 4}, {0, 1, 3}}, false);
  EXPECT_THAT(encode(bpe, "abc"), ElementsAre(0, 4));
}

TEST(Bpe, TakesWholeTokensOnlyIfMergesAreIgnored) {
  const std::vector<std::string> tokens{"a", "b", "ab"};
  EXPECT_THAT(encode(Bpe(tokens, {}, false), "ab"), ElementsAre(0, 1));
  EXPECT_THAT(encode(Bpe(tokens, {}, true), "ab"), ElementsAre(2));
  EXPECT_THAT(encode(Bpe(tokens, {}, true), "aba"), ElementsAre(0, 1, 0));
}

TEST(Bpe, LeavesOutUnknownBytes) {
  const Bpe bpe({"a", "b", "ab"}, {{0, 1, 2}}, false);
  EXPECT_THAT(encode(bpe, "axb"), ElementsAre(2));
  EXPECT_THAT(encode(bpe, "xyz"), IsEmpty());
}

TEST(Bpe, TakesALongWordInItsStride) {
  const Bpe bpe({"a", "aa", "aaaa"}, {{0, 0, 1}, {1, 1, 2}}, false);
  constexpr std::size_t kLength = (1 << 20) + 3;
  const std::vector<TokenId> tokens = encode(bpe, std::string(kLength, 'a'));
  ASSERT_EQ(tokens.size(), kLength / 4 + 2);
  EXPECT_EQ(tokens.front(), 2);
  EXPECT_EQ(tokens[tokens.size() - 2], 1);
  EXPECT_EQ(tokens.back(), 0);
}

}  // namespace
}  // namespace clusterfusion
