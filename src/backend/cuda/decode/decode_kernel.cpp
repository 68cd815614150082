#include "backend/cuda/decode/decode_kernel.hpp"

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, smallest first: INSTANCE(dtype, fragments, head steps) for
// each.
#define INSTANCE(dtype, fragments, head_steps) \
  const void* decode_kernel_plain_##dtype##_##fragments##_##head_steps();
#include "plain_instances.inc"
#undef INSTANCE
#define INSTANCE(dtype, fragments, head_steps) \
  const void* decode_kernel_any_##dtype##_##fragments##_##head_steps();
#include "any_instances.inc"
#undef INSTANCE

DecodeKernel find_decode_kernel(plan::LayerKind kind, DType dtype, int fragments, int head_dim) {
  const auto fits = [&](DType its_dtype, int its_fragments, int head_steps) {
    return dtype == its_dtype && fragments <= its_fragments && head_dim <= 16 * head_steps;
  };
  if (kind == plan::LayerKind::plain) {
#define INSTANCE(type, its_fragments, head_steps)   \
  if (fits(DType::type, its_fragments, head_steps)) \
    return {decode_kernel_plain_##type##_##its_fragments##_##head_steps(), its_fragments};
#include "plain_instances.inc"
#undef INSTANCE
  } else {
#define INSTANCE(type, its_fragments, head_steps)   \
  if (fits(DType::type, its_fragments, head_steps)) \
    return {decode_kernel_any_##type##_##its_fragments##_##head_steps(), its_fragments};
#include "any_instances.inc"
#undef INSTANCE
  }
  fail(ErrorKind::unsupported,
       "no decode kernel for {} weights with head size {} and {} fragments a lane; run this model "
       "on the CPU (device \"cpu\")",
       name_of(dtype), head_dim, fragments);
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
