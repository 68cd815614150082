#include "backend/cuda/ops/layer_scratch.hpp"

#include <compare>
#include <map>
#include <mutex>

#include "backend/cuda/check.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/ops/relaxed_capture.hpp"

namespace clusterfusion::cuda {
namespace {

struct Key {
  int device = 0;
  // A stream by its id, because a handle may be used again for another one; while it is captured,
  // when nobody may ask for that, by its handle and the id of the capture.
  unsigned long long stream = 0;
  unsigned long long capture = 0;
  std::int64_t flow_bytes = 0;
  std::int64_t between_bytes = 0;

  auto operator<=>(const Key&) const = default;
};

constexpr std::int64_t kCounterBytes = 256;

DeviceMemory cleared_scratch(const Key& key) {
  DeviceMemory memory(kCounterBytes + 2 * key.flow_bytes + key.between_bytes,
                      "scratch of the layer calls");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  check(cudaMemsetAsync(memory.as<>(), 0, kCounterBytes, stream), "clearing counters");
  check(cudaMemsetAsync(memory.as<>() + kCounterBytes, 0xff, 2 * key.flow_bytes, stream),
        "clearing flow vectors");
  check(cudaStreamSynchronize(stream), "clearing scratch");
  check(cudaStreamDestroy(stream), "giving back a stream");
  return memory;
}

}  // namespace

LayerScratchView layer_scratch(cudaStream_t stream, std::int64_t flow_bytes,
                               std::int64_t between_bytes) {
  // Never destroyed: the driver may be gone before static objects are.
  static auto& mutex = *new std::mutex;
  static auto& scratch = *new std::map<Key, DeviceMemory>;
  Key key{0, 0, 0, flow_bytes, between_bytes};
  check(cudaGetDevice(&key.device), "asking for the current device");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamGetCaptureInfo(stream, &status, &key.capture), "asking about capture");
  if (status == cudaStreamCaptureStatusNone) {
    key.capture = 0;
    check(cudaStreamGetId(stream, &key.stream), "asking for the stream's id");
  } else {
    key.stream = reinterpret_cast<std::uintptr_t>(stream);
  }

  const std::lock_guard lock(mutex);
  auto found = scratch.find(key);
  if (found == scratch.end()) {
    const RelaxedCapture relaxed;
    found = scratch.emplace(key, cleared_scratch(key)).first;
  }
  char* base = found->second.as<>();
  auto* counters = reinterpret_cast<std::uint32_t*>(base);
  return {counters, base + kCounterBytes, counters + 1, base + kCounterBytes + 2 * flow_bytes};
}

}  // namespace clusterfusion::cuda
