#include "backend/cuda/prefill/attention.hpp"

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/prefill/float32_attention.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, smallest head size first.
#define ATTENTION_INSTANCE(dtype, head_steps) AttentionKernel attention_##dtype##_##head_steps();
#include "attention_instances.inc"
#undef ATTENTION_INSTANCE

namespace {

AttentionKernel find_instance(DType dtype, std::int64_t head_dim) {
#define ATTENTION_INSTANCE(type, head_steps)                 \
  if (dtype == DType::type && head_dim <= 16 * (head_steps)) \
    return attention_##type##_##head_steps();
#include "attention_instances.inc"
#undef ATTENTION_INSTANCE
  fail(ErrorKind::unsupported,
       "no attention kernel for {} weights with head size {}; run this model on the CPU (device "
       "\"cpu\")",
       name_of(dtype), head_dim);
}

}  // namespace

AttentionKernel find_attention_kernel(DType weights_dtype, DType kv_dtype, std::int64_t head_dim) {
  const AttentionKernel kernel = kv_dtype == DType::float32
                                     ? float32_attention(weights_dtype, head_dim)
                                     : find_instance(weights_dtype, head_dim);
  check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kernel.shared_bytes),
        "reserving shared memory for attention");
  return kernel;
}

void launch_attention(const AttentionKernel& kernel, const AttentionParams& params,
                      cudaStream_t stream) {
  AttentionParams copy = params;
  void* arguments[] = {&copy};
  const DependentLaunch launch(
      dim3(static_cast<unsigned>(params.num_heads), static_cast<unsigned>(params.num_tiles)),
      dim3(kAttentionThreads), static_cast<std::size_t>(kernel.shared_bytes), stream);
  check(cudaLaunchKernelExC(launch.config(), kernel.function, arguments), "starting attention");
}

}  // namespace clusterfusion::cuda
