#include "backend/cuda/ops/layer_scratch.hpp"

#include <compare>
#include <map>
#include <mutex>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/relaxed_capture.hpp"

namespace clusterfusion::cuda {
namespace {

struct Key {
  int device = 0;
  // A stream by its id, because a handle may be used again for another one; while it is captured,
  // when nobody may ask for that, by its handle and the id of the capture.
  unsigned long long stream = 0;
  unsigned long long capture = 0;
  std::int64_t lamport_bytes = 0;
  std::int64_t between_bytes = 0;

  auto operator<=>(const Key&) const = default;
};

// Stands for the default stream's id; others do not come to be so large.
constexpr unsigned long long kDefaultStream = ~0ull;

constexpr std::int64_t kCounterBytes = 256;
static_assert((1 + 2 * kLayerCounters) * sizeof(std::uint32_t) <= kCounterBytes);

DeviceMemory cleared_scratch(const Key& key) {
  DeviceMemory memory(kCounterBytes + 2 * key.lamport_bytes + key.between_bytes,
                      "scratch of the layer calls");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  check(cudaMemsetAsync(memory.as<>(), 0, kCounterBytes, stream), "clearing counters");
  check(cudaMemsetAsync(memory.as<>() + kCounterBytes, 0xff, 2 * key.lamport_bytes, stream),
        "clearing Lamport buffers");
  check(cudaStreamSynchronize(stream), "clearing scratch");
  check(cudaStreamDestroy(stream), "giving back a stream");
  return memory;
}

Key key_of(int device, cudaStream_t stream, std::int64_t lamport_bytes,
           std::int64_t between_bytes) {
  Key key{device, kDefaultStream, 0, lamport_bytes, between_bytes};
  if (stream == nullptr) return key;  // always the same one, which cannot be captured
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamGetCaptureInfo(stream, &status, &key.capture), "asking about capture");
  if (status == cudaStreamCaptureStatusNone) {
    key.capture = 0;
    check(cudaStreamGetId(stream, &key.stream), "asking for the stream's id");
  } else {
    key.stream = reinterpret_cast<std::uintptr_t>(stream);
  }
  return key;
}

LayerScratchView view_of(const DeviceMemory& memory, std::int64_t lamport_bytes) {
  char* base = memory.as<>();
  auto* counters = reinterpret_cast<std::uint32_t*>(base);
  return {counters, base + kCounterBytes, counters + 1, base + kCounterBytes + 2 * lamport_bytes};
}

LayerScratchView find_or_make(const Key& key) {
  // Never destroyed: the driver may be gone before static objects are.
  static auto& mutex = *new std::mutex;
  static auto& scratch = *new std::map<Key, DeviceMemory>;
  const std::lock_guard lock(mutex);
  auto found = scratch.find(key);
  if (found == scratch.end()) {
    const RelaxedCapture relaxed;
    found = scratch.emplace(key, cleared_scratch(key)).first;
  }
  return view_of(found->second, key.lamport_bytes);
}

}  // namespace

LayerScratchView layer_scratch(int device, cudaStream_t stream, std::int64_t lamport_bytes,
                               std::int64_t between_bytes) {
  // A thread asks for the same again and again.
  thread_local Key last_key;
  thread_local LayerScratchView last_view{};
  const Key key = key_of(device, stream, lamport_bytes, between_bytes);
  if (last_view.lamport == nullptr || key != last_key) {
    last_view = find_or_make(key);
    last_key = key;
  }
  return last_view;
}

}  // namespace clusterfusion::cuda
