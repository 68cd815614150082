#include "backend/cuda/decode/decode_kernel.hpp"

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, smallest first: STREAM_INSTANCE(dtype, iterations, head
// steps) for each.
#define STREAM_INSTANCE(dtype, iterations, head_steps)                     \
  const void* decode_kernel_plain_##dtype##_##iterations##_##head_steps(); \
  const void* decode_kernel_any_##dtype##_##iterations##_##head_steps();
#include "stream_instances.inc"
#undef STREAM_INSTANCE

const void* find_decode_kernel(plan::LayerKind kind, DType dtype, int iterations, int head_dim) {
#define STREAM_INSTANCE(type, max_iterations, head_steps)                                    \
  if (dtype == DType::type && iterations <= max_iterations && head_dim <= 16 * (head_steps)) \
    return kind == plan::LayerKind::plain                                                    \
               ? decode_kernel_plain_##type##_##max_iterations##_##head_steps()              \
               : decode_kernel_any_##type##_##max_iterations##_##head_steps();
#include "stream_instances.inc"
#undef STREAM_INSTANCE
  fail(ErrorKind::unsupported,
       "no decode kernel for {} weights with head size {} and {} fragments a lane; run this model "
       "on the CPU (device \"cpu\")",
       name_of(dtype), head_dim, iterations);
}

void launch_decode(const void* kernel, const DecodeParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream) {
  DecodeParams copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchCooperativeKernel(kernel, dim3(sm_count), dim3(kDecodeBlockThreads), arguments,
                                    static_cast<std::size_t>(shared_bytes), stream),
        "starting the decode kernel");
}

}  // namespace clusterfusion::cuda
