// Owners of device and pinned host memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

namespace clusterfusion::cuda {

// If the environment variable CLUSTERFUSION_POISON is 1, fills memory that holds nothing yet with
// 0xFF bytes, which are NaN in every floating-point type, so that a test sees whoever reads what
// nobody wrote. Waits until that is done.
void poison_if_asked(void* data, std::int64_t bytes);
// Fills new memory with zeros, unless it is poisoned: where memory is read that nobody has written
// because nobody needs what lies there, so that initcheck reports only what matters.
void clear_unless_poisoned(void* data, std::int64_t bytes);

// `bytes` of device memory, freed with the object; poisoned if asked. Errors: out_of_memory, with
// wanted and free bytes.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(std::int64_t bytes, const char* purpose);
  // Nothing to free must mean no call: while a stream is captured, any cudaFree spoils the capture.
  ~DeviceMemory() {
    if (data_ != nullptr) cudaFree(data_);
  }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  template <typename T = char>
  T* as() const noexcept {
    return static_cast<T*>(data_);
  }
  std::int64_t bytes() const noexcept { return bytes_; }

 private:
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

// `bytes` of page-locked host memory, which copies to and from the device can overlap with work.
// Errors: out_of_memory.
class PinnedMemory {
 public:
  PinnedMemory(std::int64_t bytes, const char* purpose);
  ~PinnedMemory() { cudaFreeHost(data_); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  template <typename T = char>
  T* as() const noexcept {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

}  // namespace clusterfusion::cuda
