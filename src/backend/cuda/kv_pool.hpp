// KV pages on the device: 64 positions of all layers and heads each. Several may have one page:
// each counts, and the last to give it back frees it.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "backend/cuda/memory.hpp"

namespace clusterfusion::cuda {

class KvPool {
 public:
  explicit KvPool(std::int64_t page_bytes) : page_bytes_(page_bytes) {}

  // Any free page; its content is whatever was there. Errors: out_of_memory.
  char* take();
  void give_back(char* page);
  // One more has the page.
  void share(char* page) { ++users_.at(page); }
  bool is_shared(char* page) const { return users_.at(page) > 1; }
  // Pages that somebody has.
  std::int64_t in_use() const noexcept { return static_cast<std::int64_t>(users_.size()); }

 private:
  std::int64_t page_bytes_;
  std::vector<DeviceMemory> slabs_;
  std::vector<char*> free_;
  std::unordered_map<char*, std::int64_t> users_;  // of each page that is not free
};

}  // namespace clusterfusion::cuda
