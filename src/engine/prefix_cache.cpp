#include "engine/prefix_cache.hpp"

#include <algorithm>

namespace clusterfusion {
namespace {

using PageTokens = std::vector<TokenId>;

}  // namespace

class PrefixCache::Entry {
 public:
  struct PageHash {
    std::size_t operator()(const PageTokens& tokens) const noexcept {
      std::uint64_t hash = 14695981039346656037u;  // FNV-1a
      for (const TokenId token : tokens) {
        hash = (hash ^ static_cast<std::uint32_t>(token)) * 1099511628211u;
      }
      return static_cast<std::size_t>(hash);
    }
  };

  Entry* parent = nullptr;
  const PageTokens* tokens = nullptr;  // the key among the parent's children
  KvPageId page{};
  std::int64_t pins = 0;
  std::uint64_t last_use = 0;
  std::unordered_map<PageTokens, std::unique_ptr<Entry>, PageHash> children;
};

PrefixCache::PrefixCache() : root_(std::make_unique<Entry>()) {}
PrefixCache::~PrefixCache() = default;

KvPageId PrefixCache::page_of(const Entry& entry) noexcept { return entry.page; }

PrefixCache::Chain PrefixCache::find(std::span<const TokenId> tokens, std::int64_t most_pages) {
  Chain chain;
  const std::int64_t pages = std::min(most_pages, std::ssize(tokens) / kKvPagePositions);
  while (std::ssize(chain) < pages &&
         extend(chain, tokens.subspan(chain.size() * kKvPagePositions, kKvPagePositions))) {
  }
  return chain;
}

bool PrefixCache::extend(Chain& chain, std::span<const TokenId> tokens) {
  Entry& parent = chain.empty() ? *root_ : *chain.back();
  const auto found = parent.children.find(PageTokens(tokens.begin(), tokens.end()));
  if (found == parent.children.end()) return false;
  pin(*found->second);
  chain.push_back(found->second.get());
  return true;
}

void PrefixCache::add(Chain& chain, std::span<const TokenId> tokens, KvPageId page) {
  Entry& parent = chain.empty() ? *root_ : *chain.back();
  const auto [place, is_new] = parent.children.try_emplace(PageTokens(tokens.begin(), tokens.end()),
                                                           std::make_unique<Entry>());
  Entry& entry = *place->second;
  entry.parent = &parent;
  entry.tokens = &place->first;
  entry.page = page;
  ++num_pages_;
  pin(entry);
  chain.push_back(&entry);
}

void PrefixCache::pin(const Chain& chain) {
  for (Entry* entry : chain) pin(*entry);
}

// From the end: what stands later in a text goes first.
void PrefixCache::unpin(const Chain& chain) {
  std::for_each(chain.rbegin(), chain.rend(), [this](Entry* entry) { unpin(*entry); });
}

void PrefixCache::pin(Entry& entry) {
  if (++entry.pins > 1) return;
  ++num_pinned_;
  leaves_.erase({entry.last_use, &entry});
}

void PrefixCache::unpin(Entry& entry) {
  entry.last_use = ++time_;
  if (--entry.pins > 0) return;
  --num_pinned_;
  if (entry.children.empty()) leaves_.emplace(entry.last_use, &entry);
}

std::optional<KvPageId> PrefixCache::evict() {
  if (leaves_.empty()) return std::nullopt;
  Entry* const entry = leaves_.begin()->second;
  leaves_.erase(leaves_.begin());
  Entry* const parent = entry->parent;
  const KvPageId page = entry->page;
  parent->children.erase(parent->children.find(*entry->tokens));
  --num_pages_;
  if (parent != root_.get() && parent->pins == 0 && parent->children.empty()) {
    leaves_.emplace(parent->last_use, parent);
  }
  return page;
}

}  // namespace clusterfusion
