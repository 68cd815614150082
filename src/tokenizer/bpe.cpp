#include "tokenizer/bpe.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <functional>
#include <queue>
#include <utility>

#include "tokenizer/utf8.hpp"

namespace clusterfusion {

Bpe::Bpe(std::vector<std::string> token_bytes, const std::vector<Merge>& merges, bool ignore_merges,
         std::optional<CharacterTokens> characters)
    : token_bytes_(std::move(token_bytes)),
      characters_(characters),
      character_tokens_(token_bytes_),
      pairs_(std::bit_ceil(2 * merges.size() + 2)),
      words_(token_bytes_) {
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    insert(merges[rank], static_cast<std::uint32_t>(rank));
  }
  const auto num_tokens = static_cast<TokenId>(token_bytes_.size());
  byte_tokens_.fill(-1);
  for (TokenId id = 0; id < num_tokens; ++id) {
    if (token_bytes_[id].size() == 1) {
      byte_tokens_[static_cast<unsigned char>(token_bytes_[id][0])] = id;
    }
  }
  fallback_tokens_.fill(-1);
  if (characters_) find_character_tokens();
  // Most words of a text are one token. Knowing which words are saves merging them again and again,
  // and needs no cache that grows or is shared between threads.
  words_.reserve(token_bytes_.size());
  std::vector<TokenId> tokens;
  for (TokenId id = 0; id < num_tokens; ++id) {
    if (token_bytes_[id].empty()) continue;
    tokens.clear();
    if (!ignore_merges) merge(token_bytes_[id], tokens);
    if (ignore_merges || (tokens.size() == 1 && tokens[0] == id)) words_.insert(id);
  }
}

void Bpe::find_character_tokens() {
  for (TokenId id = 0; id < static_cast<TokenId>(token_bytes_.size()); ++id) {
    const std::string& token = token_bytes_[id];
    if (token.empty()) continue;
    std::size_t length = 0;
    decode_valid(token.data(), length);
    if (length == token.size()) character_tokens_.insert(id);
  }
  if (!characters_->byte_fallback) return;
  StringTable all(token_bytes_);
  all.reserve(token_bytes_.size());
  for (TokenId id = 0; id < static_cast<TokenId>(token_bytes_.size()); ++id) all.insert(id);
  for (std::size_t byte = 0; byte < fallback_tokens_.size(); ++byte) {
    fallback_tokens_[byte] = all.find(fmt::format("<0x{:02X}>", byte)).value_or(-1);
  }
}

// The tokens that merging begins with.
template <typename OnToken>
void Bpe::first_tokens(std::string_view word, const OnToken& on_token) const {
  if (characters_) return first_tokens_of_characters(word, on_token);
  for (const char byte : word) {
    const TokenId token = byte_tokens_[static_cast<unsigned char>(byte)];
    if (token >= 0) on_token(token);
  }
}

// As tokenizers' merge_word does it; bytes, too, come before an unknown token that is still open.
template <typename OnToken>
void Bpe::first_tokens_of_characters(std::string_view word, const OnToken& on_token) const {
  bool has_unknown = false;
  const auto close_unknown = [&] {
    if (std::exchange(has_unknown, false)) on_token(*characters_->unk);
  };
  for (std::size_t at = 0, length = 0; at < word.size(); at += length) {
    decode_valid(word.data() + at, length);
    const std::string_view character = word.substr(at, length);
    std::optional<TokenId> token;
    if (length > 1) {
      token = character_tokens_.find(character);
    } else if (const TokenId ascii = byte_tokens_[static_cast<unsigned char>(word[at])];
               ascii >= 0) {
      token = ascii;
    }
    if (token) {
      close_unknown();
      on_token(*token);
    } else if (!fall_back_to_bytes(character, on_token) && characters_->unk) {
      if (!characters_->fuse_unk) close_unknown();
      has_unknown = true;
    }
  }
  close_unknown();
}

template <typename OnToken>
bool Bpe::fall_back_to_bytes(std::string_view character, const OnToken& on_token) const {
  const auto token_of = [this](char byte) {
    return fallback_tokens_[static_cast<unsigned char>(byte)];
  };
  if (std::ranges::any_of(character, [&](char byte) { return token_of(byte) < 0; })) return false;
  for (const char byte : character) on_token(token_of(byte));
  return true;
}

void Bpe::insert(const Merge& merge, std::uint32_t rank) {
  const std::uint64_t pair = pair_of(merge.left, merge.right);
  std::size_t index = home_slot(pair) & (pairs_.size() - 1);
  while (pairs_[index].rank != kNoMerge && pairs_[index].pair != pair) {
    index = (index + 1) & (pairs_.size() - 1);
  }
  pairs_[index] = {pair, rank, merge.result};
}

inline Bpe::Found Bpe::find(TokenId left, TokenId right) const noexcept {
  const std::uint64_t pair = pair_of(left, right);
  std::size_t index = home_slot(pair) & (pairs_.size() - 1);
  while (pairs_[index].rank != kNoMerge && pairs_[index].pair != pair) {
    index = (index + 1) & (pairs_.size() - 1);
  }
  return {pairs_[index].rank, pairs_[index].result};
}

void Bpe::encode(std::string_view word, std::vector<TokenId>& out) const {
  if (const auto token = words_.find(word)) {
    out.push_back(*token);
  } else {
    merge(word, out);
  }
}

void Bpe::merge(std::string_view word, std::vector<TokenId>& out) const {
  word.size() <= kShortWord ? merge_short(word, out) : merge_long(word, out);
}

// Looks through all pairs for each merge: quadratic, but the fastest for words as people write
// them.
void Bpe::merge_short(std::string_view word, std::vector<TokenId>& out) const {
  TokenId tokens[kShortWord];
  Found merges[kShortWord];  // merges[i]: of tokens[i] and tokens[i + 1]
  std::size_t count = 0;
  first_tokens(word, [&](TokenId token) { tokens[count++] = token; });
  for (std::size_t i = 0; i + 1 < count; ++i) merges[i] = find(tokens[i], tokens[i + 1]);

  while (count > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < count; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (merges[best].rank == kNoMerge) break;
    tokens[best] = merges[best].result;
    --count;
    std::copy(tokens + best + 2, tokens + count + 1, tokens + best + 1);
    if (best + 1 < count) {
      std::copy(merges + best + 2, merges + count, merges + best + 1);
      merges[best] = find(tokens[best], tokens[best + 1]);
    }
    if (best > 0) merges[best - 1] = find(tokens[best - 1], tokens[best]);
  }
  out.insert(out.end(), tokens, tokens + count);
}

// A heap of (rank, position) over a linked list; entries that a merge has overtaken are recognised
// when they come up, because the pair at their position has another rank by then.
void Bpe::merge_long(std::string_view word, std::vector<TokenId>& out) const {
  struct Symbol {
    TokenId token;  // -1: merged into the one before it
    std::int32_t previous, next;
  };
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  first_tokens(word, [&](TokenId token) {
    const auto position = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({token, position - 1, position + 1});
  });
  const auto end = static_cast<std::int32_t>(symbols.size());

  std::vector<std::uint64_t> candidates;  // rank << 32 | position
  const auto candidate = [](std::uint32_t rank, std::int32_t position) {
    return std::uint64_t{rank} << 32 | static_cast<std::uint32_t>(position);
  };
  for (std::int32_t i = 0; i + 1 < end; ++i) {
    const Found found = find(symbols[i].token, symbols[i + 1].token);
    if (found.rank != kNoMerge) candidates.push_back(candidate(found.rank, i));
  }
  std::priority_queue queue(std::greater<std::uint64_t>(), std::move(candidates));
  const auto offer = [&](std::int32_t position) {
    const Symbol& left = symbols[position];
    const Found found = find(left.token, symbols[left.next].token);
    if (found.rank != kNoMerge) queue.push(candidate(found.rank, position));
  };

  while (!queue.empty()) {
    const auto rank = static_cast<std::uint32_t>(queue.top() >> 32);
    const auto position = static_cast<std::int32_t>(queue.top());
    queue.pop();
    Symbol& left = symbols[position];
    if (left.token < 0 || left.next == end) continue;
    Symbol& right = symbols[left.next];
    const Found found = find(left.token, right.token);
    if (found.rank != rank) continue;
    left.token = found.result;
    left.next = right.next;
    right.token = -1;
    if (left.next != end) {
      symbols[left.next].previous = position;
      offer(position);
    }
    if (left.previous >= 0) offer(left.previous);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.token >= 0) out.push_back(symbol.token);
  }
}

}  // namespace clusterfusion
