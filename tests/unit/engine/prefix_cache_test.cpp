#include "engine/prefix_cache.hpp"

#include <gtest/gtest.h>

#include <set>

namespace clusterfusion {
namespace {

// `pages` pages, each of one token repeated.
std::vector<TokenId> text_of(std::initializer_list<TokenId> pages) {
  std::vector<TokenId> tokens;
  for (const TokenId token : pages) tokens.insert(tokens.end(), kKvPagePositions, token);
  return tokens;
}

PrefixCache::Chain add_all(PrefixCache& cache, const std::vector<TokenId>& text, int first_page) {
  PrefixCache::Chain chain = cache.find(text, 1000);
  for (auto page = chain.size(); page < text.size() / kKvPagePositions; ++page) {
    cache.add(chain, std::span(text).subspan(page * kKvPagePositions, kKvPagePositions),
              KvPageId{static_cast<std::uintptr_t>(first_page) + page});
  }
  return chain;
}

std::vector<int> evict_all(PrefixCache& cache) {
  std::vector<int> pages;
  while (const auto page = cache.evict()) pages.push_back(static_cast<int>(*page));
  return pages;
}

TEST(PrefixCache, FindsTheLongestBeginning) {
  PrefixCache cache;
  const PrefixCache::Chain chain = add_all(cache, text_of({1, 2, 3}), 10);
  ASSERT_EQ(chain.size(), 3u);
  EXPECT_EQ(PrefixCache::page_of(*chain[1]), KvPageId{11});
  EXPECT_EQ(cache.find(text_of({1, 2, 3}), 100), chain);
  EXPECT_EQ(cache.find(text_of({1, 2, 3}), 2).size(), 2u);
  EXPECT_EQ(cache.find(text_of({1, 2, 4, 3}), 100).size(), 2u);
  EXPECT_EQ(cache.find(text_of({2, 3}), 100).size(), 0u) << "the same page behind another text";
  std::vector<TokenId> almost = text_of({1, 2});
  almost.back() = 3;
  EXPECT_EQ(cache.find(almost, 100).size(), 1u);
  almost.pop_back();
  EXPECT_EQ(cache.find(almost, 100).size(), 1u) << "no whole page";
}

TEST(PrefixCache, EvictsWhatWasUsedLongestAgoFromItsEnd) {
  PrefixCache cache;
  const auto first = add_all(cache, text_of({1, 2, 3}), 10);
  const auto second = add_all(cache, text_of({1, 5}), 20);
  EXPECT_EQ(cache.evict(), std::nullopt) << "all are pinned";
  EXPECT_EQ(cache.num_evictable(), 0);
  cache.unpin(first);
  cache.unpin(second);
  EXPECT_EQ(cache.num_evictable(), 4);
  cache.unpin(cache.find(text_of({1, 2}), 100));  // used again, without the third page
  EXPECT_EQ(evict_all(cache), (std::vector<int>{12, 21, 11, 10}));
  EXPECT_EQ(cache.num_pages(), 0);
}

TEST(PrefixCache, PinnedChainsStay) {
  PrefixCache cache;
  const auto long_one = add_all(cache, text_of({1, 2, 3}), 10);
  cache.unpin(add_all(cache, text_of({1, 2, 4}), 20));
  cache.unpin(add_all(cache, text_of({7}), 30));
  EXPECT_EQ(evict_all(cache), (std::vector<int>{22, 30}));
  const auto beginning = cache.find(text_of({1}), 1);
  EXPECT_EQ(beginning.size(), 1u);
  cache.unpin(long_one);
  EXPECT_EQ(evict_all(cache), (std::vector<int>{12, 11}));
  EXPECT_EQ(cache.num_pages(), 1);
}

}  // namespace
}  // namespace clusterfusion
