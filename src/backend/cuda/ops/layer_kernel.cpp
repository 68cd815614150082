#include "backend/cuda/ops/layer_kernel.hpp"

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/driver_function.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, smallest first: INSTANCE(dtype, iterations, head
// steps) for each.
#define INSTANCE(dtype, iterations, head_steps)                     \
  const void* layer_kernel_##dtype##_##iterations##_##head_steps(); \
  const void* paged_layer_kernel_##dtype##_##iterations##_##head_steps();
#include "plain_instances.inc"
#undef INSTANCE

const void* find_layer_kernel(DType dtype, int iterations, int head_dim, bool in_pages) {
#define INSTANCE(type, max_iterations, head_steps)                                           \
  if (dtype == DType::type && iterations <= max_iterations && head_dim <= 16 * (head_steps)) \
    return in_pages ? paged_layer_kernel_##type##_##max_iterations##_##head_steps()          \
                    : layer_kernel_##type##_##max_iterations##_##head_steps();
#include "plain_instances.inc"
#undef INSTANCE
  return nullptr;
}

void launch_layer(CUfunction kernel, const LayerParams& params, int sm_count,
                  std::int64_t shared_bytes, cudaStream_t stream) {
  static const auto launch = driver_function<decltype(cuLaunchKernelEx)>("cuLaunchKernelEx");
  void* arguments[] = {const_cast<LayerParams*>(&params)};
  // The launch before may still be ending: the kernel waits for that itself. Older GPUs have no
  // such launches.
  CUlaunchAttribute attribute{};
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned>(sm_count);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = kDecodeBlockThreads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(shared_bytes);
  config.hStream = stream;
  config.attrs = &attribute;
  config.numAttrs = has_bulk_copies() ? 1 : 0;
  // What a launch may return has the same number in the driver and in the runtime.
  const auto error = static_cast<cudaError_t>(launch(&config, kernel, arguments, nullptr));
  check(error, "starting the layer kernel");
}

}  // namespace clusterfusion::cuda
