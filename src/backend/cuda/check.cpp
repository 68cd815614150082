#include "backend/cuda/check.hpp"

#include "base/fail.hpp"

namespace clusterfusion::cuda {

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it does not surface somewhere else (a sticky error stays)
  const ErrorKind kind =
      error == cudaErrorMemoryAllocation ? ErrorKind::out_of_memory : ErrorKind::internal;
  fail(kind, "CUDA failed while {}: {} ({})", doing, cudaGetErrorString(error),
       cudaGetErrorName(error));
}

}  // namespace clusterfusion::cuda
