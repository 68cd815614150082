#include "backend/cuda/device_properties.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"
#include "plan/compute_capability.hpp"

namespace clusterfusion::cuda {
namespace {

cudaDeviceProp properties_as_they_are(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "asking for the device's properties");
  return properties;
}

#ifdef CLUSTERFUSION_AS_CHIP

constexpr bool kAsAmpere = CLUSTERFUSION_AS_CHIP < 900;
// Of a block, at most: "Technical Specifications per Compute Capability" of the CUDA C++
// Programming Guide.
constexpr int kSharedKib = kAsAmpere ? 163 : 99;

int shared_kib() {
  constexpr int kLeast = 16, kMost = 227;
  const char* const text = std::getenv("CLUSTERFUSION_SHARED_KIB");
  if (text == nullptr) return kSharedKib;
  char* end = nullptr;
  const long number = std::strtol(text, &end, 10);
  require(end != text && *end == '\0' && number >= kLeast && number <= kMost,
          ErrorKind::invalid_argument,
          "CLUSTERFUSION_SHARED_KIB: expected a number from {} to {}, found \"{}\"", kLeast, kMost,
          text);
  return static_cast<int>(number);
}

int major_as_seen(int) { return kAsAmpere ? 8 : 12; }

void limit_shared_memory(cudaDeviceProp& properties) {
  const auto most = static_cast<std::size_t>(shared_kib()) * 1024;
  properties.sharedMemPerBlockOptin = std::min(properties.sharedMemPerBlockOptin, most);
}

#else

int major_as_seen(int major) { return major; }

void limit_shared_memory(cudaDeviceProp&) {}

#endif

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  return device;
}

}  // namespace

cudaDeviceProp device_properties(int device) {
  cudaDeviceProp properties = properties_as_they_are(device);
  properties.major = major_as_seen(properties.major);
  limit_shared_memory(properties);
  return properties;
}

cudaDeviceProp device_properties() { return device_properties(current_device()); }

bool has_bulk_copies() {
  // A thread asks for the same device again and again.
  thread_local int last_device = -1;
  thread_local bool last = false;
  const int device = current_device();
  if (device != last_device) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "asking for the device's compute capability");
    last = major_as_seen(major) >= kFirstWithBulkCopies;
    last_device = device;
  }
  return last;
}

std::string no_code_because(int device) {
  const cudaDeviceProp properties = properties_as_they_are(device);
  const std::string reason =
      plan::no_code_because(CLUSTERFUSION_CUDA_ARCHITECTURES, {properties.major, properties.minor});
  return reason.empty() ? reason : fmt::format("{} {}", properties.name, reason);
}

}  // namespace clusterfusion::cuda
