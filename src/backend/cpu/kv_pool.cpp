#include "backend/cpu/kv_pool.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <string>

#include "backend/backend.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cpu {
namespace {

// Pages start at multiples of a huge page where they fill one.
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kCacheLine = 64;
// Every bit set is a NaN in float16, bfloat16 and float32.
constexpr int kNanByte = 0xff;

double gigabytes(std::int64_t bytes) { return static_cast<double>(bytes) * 1e-9; }

}  // namespace

std::int64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  std::int64_t kibibytes = 0;
  while (file >> name >> kibibytes) {
    if (name == "MemAvailable:") return kibibytes * 1024;
    std::getline(file, unit);
  }
  return std::numeric_limits<std::int64_t>::max();
}

KvPool::KvPool(const KvLayout& layout, std::int64_t num_layers, std::int64_t num_kv_heads)
    : layout_(layout),
      num_kv_heads_(num_kv_heads),
      head_bytes_(layout.elements() * size_of(layout.dtype)),
      page_bytes_(num_layers * num_kv_heads * head_bytes_) {}

void KvPool::Free::operator()(std::byte* page) const noexcept { std::free(page); }

std::byte* KvPool::allocate_page() {
  const std::size_t bytes = static_cast<std::size_t>(page_bytes_);
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  std::unique_ptr<std::byte[], Free> page(
      static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
  if (page == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) ::madvise(page.get(), rounded, MADV_HUGEPAGE);  // only advice
  pages_.push_back(std::move(page));
  return pages_.back().get();
}

void KvPool::grow(std::vector<std::byte*>& pages, std::int64_t count) {
  const std::int64_t before = static_cast<std::int64_t>(pages.size());
  const std::int64_t fresh = count - before - static_cast<std::int64_t>(free_.size());
  try {
    if (fresh > 0 && fresh > available_memory() / page_bytes_) throw std::bad_alloc();
    pages.reserve(static_cast<std::size_t>(count));
    free_.reserve(pages_.size() + static_cast<std::size_t>(std::max<std::int64_t>(fresh, 0)));
    while (static_cast<std::int64_t>(pages.size()) < count) {
      std::byte* page = nullptr;
      if (free_.empty()) {
        page = allocate_page();
      } else {
        page = free_.back();
        free_.pop_back();
      }
      users_[page] = 1;
      pages.push_back(page);
      std::memset(page, kNanByte, static_cast<std::size_t>(page_bytes_));
    }
  } catch (const std::bad_alloc&) {
    shrink(pages, before);
    fail(ErrorKind::out_of_memory,
         "the KV cache needs {} more pages of {} positions, {:.3f} GB ({} bytes each), beside the "
         "{:.3f} GB that it holds; the machine has {:.3f} GB left. Use shorter contexts or fewer "
         "sequences, or a 16-bit kv_dtype",
         count - before, kKvPagePositions,
         gigabytes(page_bytes_) * static_cast<double>(count - before), page_bytes_,
         gigabytes(page_bytes_) * static_cast<double>(pages_.size()),
         gigabytes(available_memory()));
  }
}

void KvPool::shrink(std::vector<std::byte*>& pages, std::int64_t count) noexcept {
  while (static_cast<std::int64_t>(pages.size()) > count) {
    let_go(pages.back());
    pages.pop_back();
  }
}

void KvPool::let_go(std::byte* page) noexcept {
  const auto found = users_.find(page);
  if (--found->second > 0) return;
  users_.erase(found);
  free_.push_back(page);  // grow() reserved the room
}

void KvPool::make_own(std::byte*& page) {
  if (!is_shared(page)) return;
  std::vector<std::byte*> fresh;
  grow(fresh, 1);
  std::memcpy(fresh[0], page, static_cast<std::size_t>(page_bytes_));
  let_go(page);
  page = fresh[0];
}

}  // namespace clusterfusion::cpu
