// The draft that costs no model: a text often says again what it, or its prompt, has said.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/draft.hpp"

namespace clusterfusion {

// The places of a growing text at which its last tokens have stood before.
//
// For each length n up to kLongest there is a hash table from the n tokens to the place where they
// ended last; the tokens themselves are compared, so that two are never taken for one. Time: a few
// hash table accesses a token, whatever the length of the text.
class NgramIndex {
 public:
  static constexpr std::int32_t kLongest = 8;

  void append(TokenId token);
  std::int64_t size() const noexcept { return static_cast<std::int64_t>(tokens_.size()); }

  // Where what was said before goes on, and how many tokens before there are the text's last.
  struct Match {
    std::int64_t next = 0;    // index of a token
    std::int64_t length = 0;  // 0: the last token is new
  };
  // Of the longest suffix, up to kLongest tokens, that has stood in the text before, the last place
  // where it did; for kLongest tokens, of the last few places the one whose match reaches furthest
  // back.
  Match find() const;
  // What followed at `match`: `count` tokens. Where they reach the text's end they go on with
  // themselves.
  std::vector<TokenId> following(const Match& match, std::int32_t count) const;

 private:
  // Place of the last token of the n tokens last seen there, by their hash; linear probing.
  struct Table {
    std::vector<std::int32_t> slots;  // -1: free; a power of 2
    std::int32_t used = 0;
  };

  std::uint64_t hash_of(std::int64_t end, std::int32_t n) const;
  bool is_same(std::int64_t end, std::int64_t other_end, std::int32_t n) const;
  std::size_t find_slot(const Table& table, std::uint64_t hash, std::int64_t end,
                        std::int32_t n) const;
  void insert(std::int64_t end);
  void enlarge(Table& table, std::int32_t n);
  std::int64_t match_length(std::int64_t end) const;

  std::vector<TokenId> tokens_;
  std::array<Table, kLongest> tables_;  // of all n-grams but those that end with the last token
  std::vector<std::int32_t> previous_;  // where the kLongest tokens that end here ended before; -1
};

class NgramDraft final : public Draft {
 public:
  std::string name() const override { return "ngram"; }
  std::unique_ptr<DraftText> begin(const SamplingParams& sampling) override;
  void propose(std::span<DraftQuery> queries) override;
  bool is_cheap() const override { return true; }
};

}  // namespace clusterfusion
