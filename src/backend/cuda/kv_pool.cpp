#include "backend/cuda/kv_pool.hpp"

#include <algorithm>
#include <utility>

namespace clusterfusion::cuda {
namespace {

// Small pages are allocated together.
constexpr std::int64_t kSlabBytes = 16 << 20;

}  // namespace

char* KvPool::take() {
  if (free_.empty()) {
    const std::int64_t pages = std::max<std::int64_t>(1, kSlabBytes / page_bytes_);
    DeviceMemory slab(pages * page_bytes_, "the KV cache");
    // Blocks of positions are read whole, also where no key or value has been written yet.
    clear_unless_poisoned(slab.as<>(), pages * page_bytes_);
    slabs_.push_back(std::move(slab));
    for (std::int64_t i = pages - 1; i >= 0; --i)
      free_.push_back(slabs_.back().as<>() + i * page_bytes_);
  }
  char* page = free_.back();
  free_.pop_back();
  users_[page] = 1;
  poison_if_asked(page, page_bytes_);
  return page;
}

void KvPool::give_back(char* page) {
  const auto found = users_.find(page);
  if (--found->second > 0) return;
  users_.erase(found);
  free_.push_back(page);
}

}  // namespace clusterfusion::cuda
