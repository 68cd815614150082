// Byte pair encoding of single words (Sennrich et al. 2016, as tokenizers' models/bpe does it).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "clusterfusion/model.hpp"
#include "tokenizer/string_table.hpp"

namespace clusterfusion {

// Which two adjacent tokens become which one; the smaller the rank, the sooner.
struct Merge {
  TokenId left, right, result;
};

// How words become the first tokens of a model that is not byte-level: one for each character.
struct CharacterTokens {
  bool byte_fallback = false;  // a character that is no token becomes its bytes, as "<0x0A>"
  std::optional<TokenId> unk;  // or else this token; nothing becomes of it without
  bool fuse_unk = false;       // several of them in a row become one
};

class Bpe {
 public:
  // token_bytes[id]: the bytes of each token; empty for a token that no text can give.
  // merges: in the order of their ranks; of two with the same pair the later counts.
  // ignore_merges: a word that is a token is that token, whatever the merges would give.
  // characters: words are cut into characters, not bytes, and so are token_bytes spelled.
  Bpe(std::vector<std::string> token_bytes, const std::vector<Merge>& merges, bool ignore_merges,
      std::optional<CharacterTokens> characters = std::nullopt);
  Bpe(const Bpe&) = delete;
  Bpe& operator=(const Bpe&) = delete;

  // Appends the tokens of `word`. Always the adjacent pair of the smallest rank is merged, the
  // leftmost first, until none is left. Bytes that are no token of their own are left out, as
  // tokenizers does without an unk_token. Takes O(n log n) time for n bytes; n < 2^31.
  void encode(std::string_view word, std::vector<TokenId>& out) const;

 private:
  static constexpr std::uint32_t kNoMerge = UINT32_MAX;
  static constexpr std::size_t kShortWord = 48;

  struct PairSlot {
    std::uint64_t pair;
    std::uint32_t rank = kNoMerge;  // kNoMerge: free
    TokenId result;
  };
  struct Found {
    std::uint32_t rank;
    TokenId result;
  };

  static std::uint64_t pair_of(TokenId left, TokenId right) noexcept {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 |
           static_cast<std::uint32_t>(right);
  }
  static std::size_t home_slot(std::uint64_t pair) noexcept {
    return (pair * 0x9E3779B97F4A7C15u) >> 32;
  }
  void insert(const Merge& merge, std::uint32_t rank);
  void find_character_tokens();
  template <typename OnToken>
  void first_tokens(std::string_view word, const OnToken& on_token) const;
  template <typename OnToken>
  void first_tokens_of_characters(std::string_view word, const OnToken& on_token) const;
  template <typename OnToken>
  bool fall_back_to_bytes(std::string_view character, const OnToken& on_token) const;
  Found find(TokenId left, TokenId right) const noexcept;
  void merge_short(std::string_view word, std::vector<TokenId>& out) const;
  void merge_long(std::string_view word, std::vector<TokenId>& out) const;
  void merge(std::string_view word, std::vector<TokenId>& out) const;

  std::vector<std::string> token_bytes_;
  std::array<TokenId, 256> byte_tokens_;
  std::optional<CharacterTokens> characters_;
  std::array<TokenId, 256> fallback_tokens_;  // "<0x00>" and so on; -1: there is none
  StringTable character_tokens_;              // tokens of one character
  std::vector<PairSlot> pairs_;               // open addressing, a power of two
  StringTable words_;                         // words that are known to be one token
};

}  // namespace clusterfusion
