#include "backend/cuda/stream/stream_kernel.hpp"

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {

// The instances that the build has made, those for narrow heads first:
// ROWS_INSTANCE(dtype, operand rows, pieces, head steps) for each.
#define ROWS_INSTANCE(dtype, operand_rows, pieces, head_steps) \
  const void* stream_kernel_##dtype##_##operand_rows##_##pieces##_##head_steps();
#include "rows_instances.inc"
#undef ROWS_INSTANCE

StreamKernel find_stream_kernel(DType dtype, std::int64_t head_dim, std::int32_t operand_rows,
                                std::int32_t pieces) {
#define ROWS_INSTANCE(type, operand_rows_, pieces_, head_steps)                                 \
  if (dtype == DType::type && head_dim <= 16 * (head_steps) && operand_rows == operand_rows_ && \
      pieces == pieces_)                                                                        \
    return {stream_kernel_##type##_##operand_rows_##_##pieces_##_##head_steps(),                \
            plan::max_task_queries(16 * (head_steps), operand_rows_)};
#include "rows_instances.inc"
#undef ROWS_INSTANCE
  return {};
}

void launch_stream(const void* kernel, const StreamParams& params, int sm_count,
                   std::int64_t shared_bytes, cudaStream_t stream) {
  StreamParams copy = params;
  void* arguments[] = {&copy};
  check(cudaLaunchCooperativeKernel(kernel, dim3(sm_count), dim3(kStreamBlockThreads), arguments,
                                    static_cast<std::size_t>(shared_bytes), stream),
        "starting the streaming kernel");
}

}  // namespace clusterfusion::cuda
