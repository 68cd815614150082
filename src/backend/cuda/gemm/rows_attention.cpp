#include <algorithm>

#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/gemm/attention_memory.hpp"
#include "backend/cuda/gemm/row_step.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, those for narrow heads first.
#define ROWS_ATTENTION_INSTANCE(dtype, head_steps)     \
  const void* rows_attention_##dtype##_##head_steps(); \
  const void* rows_combine_##dtype##_##head_steps();
#include "rows_attention_instances.inc"
#undef ROWS_ATTENTION_INSTANCE

namespace {

constexpr unsigned kThreads = plan::kConsumerWarps * 32;

struct Kernels {
  const void *attend = nullptr, *combine = nullptr;
};

Kernels find_kernels(DType dtype, std::int64_t head_dim) {
#define ROWS_ATTENTION_INSTANCE(type, head_steps)            \
  if (dtype == DType::type && head_dim <= 16 * (head_steps)) \
    return {rows_attention_##type##_##head_steps(), rows_combine_##type##_##head_steps()};
#include "rows_attention_instances.inc"
#undef ROWS_ATTENTION_INSTANCE
  return {};
}

// As many warps as fit beside each other, or all that a block can have.
std::int32_t warps_of_block(std::int32_t head_dim, std::int64_t shared_bytes) {
  const std::int64_t fit = shared_bytes / gemm::attention_memory(head_dim).warp_bytes;
  return static_cast<std::int32_t>(std::min<std::int64_t>(fit, gemm::kMaxAttentionWarps));
}

}  // namespace

bool RowsAttention::supports(DType dtype, std::int64_t head_dim) {
  return head_dim % 8 == 0 && find_kernels(dtype, head_dim).attend != nullptr;
}

RowsAttention::RowsAttention(DType dtype, std::int64_t head_dim, const plan::DeviceLimits& limits)
    : sm_count_(limits.sm_count),
      warps_(warps_of_block(static_cast<std::int32_t>(head_dim), limits.shared_bytes_per_block)),
      warp_bytes_(gemm::attention_memory(static_cast<std::int32_t>(head_dim)).warp_bytes) {
  require(supports(dtype, head_dim) && warps_ > 0, ErrorKind::unsupported,
          "no attention kernel for {} weights with head size {}; run this model on the CPU (device "
          "\"cpu\")",
          name_of(dtype), head_dim);
  const Kernels kernels = find_kernels(dtype, head_dim);
  attend_ = kernels.attend;
  combine_ = kernels.combine;
  check(cudaFuncSetAttribute(attend_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             warps_ * warp_bytes_),
        "reserving shared memory for attention");
}

void RowsAttention::launch(const StreamParams& params, std::int32_t layer, std::int32_t step,
                           std::int32_t splits, cudaStream_t stream) const {
  StreamParams copy = params;
  std::int32_t the_layer = layer, the_step = step, sm_count = sm_count_, the_splits = splits;
  void* arguments[] = {&copy, &the_layer, &the_step, &sm_count, &the_splits};
  const std::int32_t tasks = params.num_heads * params.groups * splits;
  const DependentLaunch how(dim3(static_cast<unsigned>((tasks + warps_ - 1) / warps_)),
                            dim3(static_cast<unsigned>(warps_) * 32),
                            static_cast<std::size_t>(warps_) * warp_bytes_, stream);
  check(cudaLaunchKernelExC(how.config(), attend_, arguments), "starting attention of many rows");
  if (splits == 1) return;
  void* combine_arguments[] = {&copy, &the_step, &sm_count};
  const auto elements = static_cast<unsigned>(params.num_heads * params.head_dim);
  const DependentLaunch combine(
      dim3((elements + kThreads - 1) / kThreads, static_cast<unsigned>(params.rows)),
      dim3(kThreads), 0, stream);
  check(cudaLaunchKernelExC(combine.config(), combine_, combine_arguments),
        "starting the merging of splits");
}

}  // namespace clusterfusion::cuda
