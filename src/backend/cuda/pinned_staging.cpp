#include "backend/cuda/pinned_staging.hpp"

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {

PinnedStaging::PinnedStaging(char* block, int num_buffers, std::int64_t buffer_bytes)
    : block_(block),
      buffer_bytes_(buffer_bytes),
      memory_(num_buffers * buffer_bytes, "the staging buffers"),
      copied_(num_buffers) {
  check(cudaGetDevice(&device_), "asking for the current device");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  for (cudaEvent_t& event : copied_)
    check(cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming),
          "creating an event");
}

PinnedStaging::~PinnedStaging() {
  cudaStreamSynchronize(stream_);
  for (const cudaEvent_t event : copied_) cudaEventDestroy(event);
  cudaStreamDestroy(stream_);
}

std::span<std::byte> PinnedStaging::acquire(int buffer) {
  // The threads that fill buffers start with device 0.
  check(cudaSetDevice(device_), "choosing the device");
  check(cudaEventSynchronize(copied_[buffer]), "waiting for a copy of weights");
  return {data(buffer), static_cast<std::size_t>(buffer_bytes_)};
}

void PinnedStaging::start_copy(int buffer, std::int64_t offset, std::int64_t bytes) {
  check(cudaMemcpyAsync(block_ + offset, data(buffer), bytes, cudaMemcpyHostToDevice, stream_),
        "copying weights");
  check(cudaEventRecord(copied_[buffer], stream_), "copying weights");
}

void PinnedStaging::finish() { check(cudaStreamSynchronize(stream_), "copying weights"); }

}  // namespace clusterfusion::cuda
