#include "backend/cuda/memory.hpp"

#include <cstdlib>
#include <string_view>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

void fill(void* data, int byte, std::int64_t bytes) {
  // On a stream of its own, which may be waited for also while another one is captured.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  check(cudaMemsetAsync(data, byte, static_cast<std::size_t>(bytes), stream),
        "filling device memory");
  check(cudaStreamSynchronize(stream), "filling device memory");
  check(cudaStreamDestroy(stream), "giving back a stream");
}

bool poison_asked() {
  const char* asked = std::getenv("CLUSTERFUSION_POISON");
  return asked != nullptr && std::string_view(asked) == "1";
}

}  // namespace

void poison_if_asked(void* data, std::int64_t bytes) {
  if (poison_asked()) fill(data, 0xFF, bytes);
}

void clear_unless_poisoned(void* data, std::int64_t bytes) {
  if (!poison_asked()) fill(data, 0, bytes);
}

DeviceMemory::DeviceMemory(std::int64_t bytes, const char* purpose) : bytes_(bytes) {
  if (bytes == 0) return;
  const cudaError_t error = cudaMalloc(&data_, static_cast<std::size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    fail(ErrorKind::out_of_memory,
         "not enough GPU memory for {}: {:.2f} GB wanted, {:.2f} of {:.2f} GB free; close other "
         "programs on this GPU, ask for a shorter context, or use device \"cpu\"",
         purpose, bytes / 1e9, free / 1e9, total / 1e9);
  }
  check(error, "allocating device memory");
  poison_if_asked(data_, bytes);
}

PinnedMemory::PinnedMemory(std::int64_t bytes, const char* purpose) {
  const cudaError_t error = cudaMallocHost(&data_, static_cast<std::size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(ErrorKind::out_of_memory,
         "the system does not give {:.2f} GB of page-locked host memory for {}; close other "
         "programs, or use device \"cpu\"",
         bytes / 1e9, purpose);
  }
  check(error, "allocating page-locked host memory");
}

}  // namespace clusterfusion::cuda
