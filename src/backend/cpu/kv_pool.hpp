// Pages of keys and values, shared by all sequences.
//
// A page holds kKvPagePositions positions of every layer and head:
//   [layer][head] KvLayout: keys [head_dim][64], values [64][padded(head_dim)]
// Pages are allocated when they are first wanted and stay with the pool; released pages are handed
// out again. A page starts as all NaN, so anything read before it was written shows in the logits.
// Several may have one page: each counts, and the last to let go gives it back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "backend/cpu/kernels.hpp"

namespace clusterfusion::cpu {

class KvPool {
 public:
  KvPool(const KvLayout& layout, std::int64_t num_layers, std::int64_t num_kv_heads);

  const KvLayout& layout() const noexcept { return layout_; }
  std::int64_t page_bytes() const noexcept { return page_bytes_; }
  // From a page's start to those of a layer's head of keys and values.
  std::int64_t offset(std::int64_t layer, std::int64_t head) const noexcept {
    return (layer * num_kv_heads_ + head) * head_bytes_;
  }

  // Appends pages to `pages` until there are `count`; all or none.
  // Errors: out_of_memory, with what was wanted, what is in use and what the machine has left.
  void grow(std::vector<std::byte*>& pages, std::int64_t count);
  // Lets go of the pages from index `count` on.
  void shrink(std::vector<std::byte*>& pages, std::int64_t count) noexcept;

  // One more has the page.
  void share(std::byte* page) { ++users_.at(page); }
  // One less.
  void let_go(std::byte* page) noexcept;
  bool is_shared(std::byte* page) const { return users_.at(page) > 1; }
  // Replaces a page that others have too by a copy. Errors: those of grow().
  void make_own(std::byte*& page);
  // Pages that somebody has.
  std::int64_t in_use() const noexcept { return static_cast<std::int64_t>(users_.size()); }

 private:
  struct Free {
    void operator()(std::byte* page) const noexcept;
  };
  std::byte* allocate_page();

  KvLayout layout_;
  std::int64_t num_kv_heads_;
  std::int64_t head_bytes_;
  std::int64_t page_bytes_;
  std::vector<std::unique_ptr<std::byte[], Free>> pages_;
  std::vector<std::byte*> free_;
  std::unordered_map<std::byte*, std::int64_t> users_;  // of each page that is not free
};

// Bytes that the machine can still give without swapping; the largest number if unknown.
std::int64_t available_memory();

}  // namespace clusterfusion::cpu
