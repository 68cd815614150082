#include "engine/ngram_draft.hpp"

#include <algorithm>
#include <bit>

namespace clusterfusion {
namespace {

constexpr std::int32_t kFree = -1;
constexpr std::size_t kFirstSlots = 64;
constexpr int kPlacesTried = 16;
constexpr std::int64_t kMatchMeasured = 64;  // tokens; a longer match is not told from this
// Of a text that has grown by more a part is read, so that nobody waits.
constexpr std::int64_t kReadAtOnce = 4096;

constexpr std::uint64_t mixed(std::uint64_t hash, TokenId token) {
  hash = (hash ^ static_cast<std::uint32_t>(token)) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 29;
}

// Longer matches go on longer as well.
std::int32_t certainty_of(std::int64_t match_length) {
  return std::min(
      static_cast<std::int32_t>(std::bit_width(static_cast<std::uint64_t>(match_length))) - 1,
      kCertainties - 1);
}

class NgramText final : public DraftText {
 public:
  void append(std::span<const TokenId> tokens) override {
    waiting_.insert(waiting_.end(), tokens.begin(), tokens.end());
  }

  bool read() override {
    const auto end = std::min(read_ + static_cast<std::size_t>(kReadAtOnce), waiting_.size());
    for (; read_ < end; ++read_) index_.append(waiting_[read_]);
    if (read_ < waiting_.size()) return false;
    waiting_.clear();
    read_ = 0;
    return true;
  }

  const NgramIndex& index() const noexcept { return index_; }

 private:
  NgramIndex index_;
  std::vector<TokenId> waiting_;
  std::size_t read_ = 0;  // of those that wait
};

}  // namespace

std::uint64_t NgramIndex::hash_of(std::int64_t end, std::int32_t n) const {
  std::uint64_t hash = 0;
  for (std::int64_t i = end; i > end - n; --i) {
    hash = mixed(hash, tokens_[static_cast<std::size_t>(i)]);
  }
  return hash;
}

bool NgramIndex::is_same(std::int64_t end, std::int64_t other_end, std::int32_t n) const {
  const auto at = [&](std::int64_t last) { return tokens_.begin() + (last + 1 - n); };
  return std::equal(at(end), at(end) + n, at(other_end));
}

// Where the n tokens that end at `end` are, or would be.
std::size_t NgramIndex::find_slot(const Table& table, std::uint64_t hash, std::int64_t end,
                                  std::int32_t n) const {
  const std::size_t mask = table.slots.size() - 1;
  std::size_t slot = static_cast<std::size_t>(hash >> 20) & mask;
  while (table.slots[slot] != kFree && !is_same(end, table.slots[slot], n)) {
    slot = (slot + 1) & mask;
  }
  return slot;
}

void NgramIndex::enlarge(Table& table, std::int32_t n) {
  const std::vector<std::int32_t> old = std::move(table.slots);
  table.slots.assign(std::max(kFirstSlots, 2 * old.size()), kFree);
  for (const std::int32_t end : old) {
    if (end != kFree) table.slots[find_slot(table, hash_of(end, n), end, n)] = end;
  }
}

// The n-grams that end there.
void NgramIndex::insert(std::int64_t end) {
  std::uint64_t hash = 0;
  previous_.push_back(kFree);
  const auto longest = static_cast<std::int32_t>(std::min<std::int64_t>(kLongest, end + 1));
  for (std::int32_t n = 1; n <= longest; ++n) {
    hash = mixed(hash, tokens_[static_cast<std::size_t>(end + 1 - n)]);
    Table& table = tables_[static_cast<std::size_t>(n - 1)];
    if (2 * static_cast<std::size_t>(table.used) >= table.slots.size()) enlarge(table, n);
    std::int32_t& slot = table.slots[find_slot(table, hash, end, n)];
    if (slot == kFree) ++table.used;
    if (n == kLongest) previous_.back() = slot;
    slot = static_cast<std::int32_t>(end);
  }
}

void NgramIndex::append(TokenId token) {
  tokens_.push_back(token);
  if (size() > 1) insert(size() - 2);
}

// How many tokens up to `end` are the text's last.
std::int64_t NgramIndex::match_length(std::int64_t end) const {
  std::int64_t length = 0;
  const std::int64_t last = size() - 1;
  while (length <= end && length < kMatchMeasured &&
         tokens_[static_cast<std::size_t>(end - length)] ==
             tokens_[static_cast<std::size_t>(last - length)]) {
    ++length;
  }
  return length;
}

NgramIndex::Match NgramIndex::find() const {
  const std::int64_t last = size() - 1;
  for (auto n = static_cast<std::int32_t>(std::min<std::int64_t>(kLongest, last)); n > 0; --n) {
    const Table& table = tables_[static_cast<std::size_t>(n - 1)];
    if (table.slots.empty()) continue;
    std::int32_t end = table.slots[find_slot(table, hash_of(last, n), last, n)];
    if (end == kFree) continue;
    Match best{end + 1, match_length(end)};
    for (int i = 1; n == kLongest && i < kPlacesTried; ++i) {
      end = previous_[static_cast<std::size_t>(end)];
      if (end == kFree) break;
      const std::int64_t length = match_length(end);
      if (length > best.length) best = {end + 1, length};
    }
    return best;
  }
  return {};
}

std::vector<TokenId> NgramIndex::following(const Match& match, std::int32_t count) const {
  std::vector<TokenId> result;
  for (std::int64_t at = match.next; std::ssize(result) < count; ++at) {
    result.push_back(at < size() ? tokens_[static_cast<std::size_t>(at)]
                                 : result[static_cast<std::size_t>(at - size())]);
  }
  return result;
}

std::unique_ptr<DraftText> NgramDraft::begin(const SamplingParams&) {
  return std::make_unique<NgramText>();
}

void NgramDraft::propose(std::span<DraftQuery> queries) {
  for (DraftQuery& query : queries) {
    const NgramIndex& index = static_cast<const NgramText&>(*query.text).index();
    const NgramIndex::Match match = index.find();
    if (match.length == 0) continue;
    query.tokens = index.following(match, query.most);
    query.certainty = certainty_of(match.length);
  }
}

}  // namespace clusterfusion
