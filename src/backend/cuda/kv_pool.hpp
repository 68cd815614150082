// KV pages on the device: 64 positions of all layers and heads each.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cuda/memory.hpp"

namespace clusterfusion::cuda {

class KvPool {
 public:
  explicit KvPool(std::int64_t page_bytes) : page_bytes_(page_bytes) {}

  // Any free page; its content is whatever was there. Errors: out_of_memory.
  char* take();
  void give_back(char* page) { free_.push_back(page); }

 private:
  std::int64_t page_bytes_;
  std::vector<DeviceMemory> slabs_;
  std::vector<char*> free_;
};

}  // namespace clusterfusion::cuda
