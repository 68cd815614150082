// Staging buffers in pinned host memory, copied into a block of device memory.
#pragma once

#include <vector>

#include "backend/cuda/memory.hpp"
#include "backend/load/upload.hpp"

namespace clusterfusion::cuda {

class PinnedStaging final : public StagingDevice {
 public:
  // `block`: where the copies go. Errors: out_of_memory.
  PinnedStaging(char* block, int num_buffers, std::int64_t buffer_bytes);
  // Waits for what is under way.
  ~PinnedStaging() override;
  PinnedStaging(const PinnedStaging&) = delete;
  PinnedStaging& operator=(const PinnedStaging&) = delete;

  std::span<std::byte> acquire(int buffer) override;
  void start_copy(int buffer, std::int64_t offset, std::int64_t bytes) override;
  void finish() override;

 private:
  std::byte* data(int buffer) const { return memory_.as<std::byte>() + buffer * buffer_bytes_; }

  char* const block_;
  const std::int64_t buffer_bytes_;
  int device_ = 0;
  PinnedMemory memory_;
  cudaStream_t stream_ = nullptr;
  std::vector<cudaEvent_t> copied_;  // for each buffer: the last copy out of it has ended
};

}  // namespace clusterfusion::cuda
