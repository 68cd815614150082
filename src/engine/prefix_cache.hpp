// Which pages of the KV cache hold the beginnings of texts.
//
// A trie: the root stands for the empty text, each entry for one full page of tokens behind its
// parent's. Children are found by a hash of their tokens and compared token by token, so that two
// texts are never taken for one. An entry holds its page (Backend::hold_page) until it is evicted.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/backend.hpp"

namespace clusterfusion {

// Not thread-safe. Who uses an entry pins it, and all before it in its chain.
class PrefixCache {
 public:
  class Entry;
  using Chain = std::vector<Entry*>;  // of pages 0, 1, ... of a text

  PrefixCache();
  ~PrefixCache();
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // The entries of the first pages of `tokens`, as many as there are, but at most `most_pages`;
  // pinned.
  Chain find(std::span<const TokenId> tokens, std::int64_t most_pages);
  // The entry behind `chain` whose page has `tokens`, pinned and appended to it; false if there is
  // none.
  bool extend(Chain& chain, std::span<const TokenId> tokens);
  // Makes that entry, of a page that is held for it.
  void add(Chain& chain, std::span<const TokenId> tokens, KvPageId page);
  static KvPageId page_of(const Entry& entry) noexcept;

  void pin(const Chain& chain);
  void unpin(const Chain& chain);

  // Takes out the entry that nobody has pinned for the longest time, the last of its chain first,
  // and returns its page; nothing if all are pinned.
  std::optional<KvPageId> evict();

  std::int64_t num_pages() const noexcept { return num_pages_; }
  std::int64_t num_evictable() const noexcept { return num_pages_ - num_pinned_; }

 private:
  void pin(Entry& entry);
  void unpin(Entry& entry);

  std::unique_ptr<Entry> root_;
  // Without pins and children; the one that goes first comes first.
  std::set<std::pair<std::uint64_t, Entry*>> leaves_;
  std::uint64_t time_ = 0;  // counts uses
  std::int64_t num_pages_ = 0;
  std::int64_t num_pinned_ = 0;
};

}  // namespace clusterfusion
