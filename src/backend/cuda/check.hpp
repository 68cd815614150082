// CUDA errors as clusterfusion::Error.
#pragma once

#include <cuda_runtime_api.h>

namespace clusterfusion::cuda {

// Throws if `error` is one: out_of_memory for a failed allocation, else internal. `doing` says what
// was attempted, as in "allocating the weights".
void check(cudaError_t error, const char* doing);

}  // namespace clusterfusion::cuda
