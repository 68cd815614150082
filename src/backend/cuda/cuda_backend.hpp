// The Backend on an NVIDIA GPU: the whole decode step in one persistent kernel.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion {

// Why no GPU of this machine can be used, or an empty string if one can: "no NVIDIA GPU with a
// driver for CUDA 13", "NVIDIA A100 has compute capability 8.0; this build runs on ...". Never
// throws.
std::string cuda_unavailable_reason();

// Errors: unsupported (no usable device; a model that the kernels do not cover), out_of_memory.
std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model> model,
                                           const BackendOptions& options);

}  // namespace clusterfusion
