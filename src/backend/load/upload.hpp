// Host memory to a device, through a few staging buffers: while one of them is copied, others are
// filled. Knows nothing of the device but what StagingDevice says, so it is tested without one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace clusterfusion {

// Bytes that go to the positions [offset, offset + bytes) of the device's block of memory.
struct UploadPart {
  const std::byte* source = nullptr;
  std::int64_t bytes = 0;
  std::int64_t offset = 0;
};

// Staging buffers, and copies out of them that run while the caller goes on. Different buffers may
// be used by different threads at the same time.
class StagingDevice {
 public:
  virtual ~StagingDevice() = default;
  // All of the buffer, once the last copy out of it has ended.
  virtual std::span<std::byte> acquire(int buffer) = 0;
  // Starts to copy the buffer's first `bytes` to `offset` of the device's block.
  virtual void start_copy(int buffer, std::int64_t offset, std::int64_t bytes) = 0;
  // Waits for all copies.
  virtual void finish() = 0;
};

struct UploadOptions {
  int threads = 1;                // that fill buffers, the calling one included
  std::int64_t buffer_bytes = 0;  // size of each of the device's buffers
  // Called on the calling thread with bytes done and in all: first with 0, last with all.
  std::function<void(std::int64_t done, std::int64_t total)> progress = {};
  // Called by any of the threads, after it has read these bytes of a part.
  std::function<void(std::span<const std::byte>)> after_reading = {};
};

// Each thread fills two buffers in turns.
inline constexpr int kBuffersPerThread = 2;

// Copies `parts` (in the order of their offsets, not overlapping) into a block of `total` bytes;
// what lies between them becomes 0. The device must have threads x kBuffersPerThread buffers.
// Each byte is read once. An exception of a callback or of the device ends the upload and comes out
// of here; the device may then still be copying.
void upload(std::span<const UploadPart> parts, std::int64_t total, StagingDevice& device,
            const UploadOptions& options);

}  // namespace clusterfusion
