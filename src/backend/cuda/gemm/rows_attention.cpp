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

constexpr unsigned kThreads = plan::kConsumerThreads;

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

}  // namespace

bool RowsAttention::supports(DType dtype, std::int64_t head_dim) {
  return head_dim % 8 == 0 && find_kernels(dtype, head_dim).attend != nullptr;
}

RowsAttention::RowsAttention(DType dtype, std::int64_t head_dim, std::int32_t sm_count)
    : sm_count_(sm_count) {
  require(supports(dtype, head_dim), ErrorKind::unsupported,
          "no attention kernel for {} weights with head size {}; run this model on the CPU (device "
          "\"cpu\")",
          name_of(dtype), head_dim);
  const Kernels kernels = find_kernels(dtype, head_dim);
  attend_ = kernels.attend;
  combine_ = kernels.combine;
  const plan::TaskLayout most =
      plan::task_layout(head_dim, {plan::kQuadQueries, plan::kMaxSequenceRows});
  check(cudaFuncSetAttribute(attend_, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             gemm::attention_bytes(static_cast<std::int32_t>(head_dim), most)),
        "reserving shared memory for attention");
}

void RowsAttention::launch(const StreamParams& params, const plan::TaskExtent& extent,
                           std::int32_t splits, std::int32_t layer, std::int32_t step,
                           cudaStream_t stream) const {
  StreamParams copy = params;
  copy.task_queries = extent.queries;
  copy.task_layout = plan::task_layout(params.head_dim, extent);
  std::int32_t the_layer = layer, the_step = step, sm_count = sm_count_;
  void* arguments[] = {&copy, &the_layer, &the_step, &sm_count};
  const DependentLaunch how(
      dim3(static_cast<unsigned>(params.num_heads), static_cast<unsigned>(params.groups),
           static_cast<unsigned>(splits)),
      dim3(gemm::kAttentionWarps * 32),
      static_cast<std::size_t>(gemm::attention_bytes(params.head_dim, copy.task_layout)), stream);
  check(cudaLaunchKernelExC(how.config(), attend_, arguments), "starting attention of many rows");
  if (splits == 1) return;
  void* combine_arguments[] = {&copy, &the_layer, &the_step, &sm_count};
  const auto pairs = static_cast<unsigned>(params.num_heads * params.head_dim / 2);
  const DependentLaunch combine(
      dim3((pairs + kThreads - 1) / kThreads, static_cast<unsigned>(params.rows)), dim3(kThreads),
      0, stream);
  check(cudaLaunchKernelExC(combine.config(), combine_, combine_arguments),
        "starting the merging of splits");
}

}  // namespace clusterfusion::cuda
