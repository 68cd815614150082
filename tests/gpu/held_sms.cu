#include <chrono>
#include <string>
#include <thread>

#include "backend/cuda/check.hpp"
#include "clusterfusion/error.hpp"
#include "held_sms.hpp"

namespace clusterfusion::test {
namespace {

using cuda::check;
using std::chrono::steady_clock;

constexpr std::uint64_t kMostNanoseconds = 10'000'000'000;

__device__ std::uint64_t now() {
  std::uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

__global__ void hold(volatile std::uint32_t* flags) {
  atomicAdd_system(const_cast<std::uint32_t*>(flags), 1u);
  const std::uint64_t begin = now();
  while (flags[1] == 0 && now() - begin < kMostNanoseconds) __nanosleep(1000);
}

}  // namespace

HeldSms::HeldSms(int count) {
  int device = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for shared memory");
  check(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "reserving shared memory");
  void* host = nullptr;
  check(cudaHostAlloc(&host, 2 * sizeof(std::uint32_t), cudaHostAllocMapped), "making flags");
  flags_ = static_cast<volatile std::uint32_t*>(host);
  flags_[0] = 0;
  flags_[1] = 0;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  void* mapped = nullptr;
  check(cudaHostGetDevicePointer(&mapped, host, 0), "mapping flags");
  hold<<<count, 32, shared_bytes, stream_>>>(static_cast<volatile std::uint32_t*>(mapped));
  check(cudaGetLastError(), "holding SMs");
  const auto begin = steady_clock::now();
  while (flags_[0] < static_cast<std::uint32_t>(count)) {
    if (steady_clock::now() - begin > std::chrono::seconds(5)) {
      const std::uint32_t found = flags_[0];
      release();
      throw Error(ErrorKind::unsupported,
                  std::to_string(count) + " SMs could not be held, but " + std::to_string(found));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

HeldSms::~HeldSms() { release(); }

void HeldSms::release() {
  end();
  cudaStreamDestroy(stream_);
  cudaFreeHost(const_cast<std::uint32_t*>(flags_));
}

bool HeldSms::held() const { return cudaStreamQuery(stream_) == cudaErrorNotReady; }

void HeldSms::end() {
  flags_[1] = 1;
  cudaStreamSynchronize(stream_);
}

}  // namespace clusterfusion::test
