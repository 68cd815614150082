// The layer calls as a handful of ordinary launches: every layer and every shape, at less speed
// than the streaming kernel. Activations stay float32 between the launches.
#pragma once

#include <cuda_runtime_api.h>

#include "backend/layer_ops.hpp"

namespace clusterfusion::cuda {

// Where the plain kernels run: on the current device.
struct PlainPlace {
  int device = 0;
  int sm_count = 0;
  cudaStream_t stream = nullptr;
};

// Loads the kernels for tensors of `dtype` (float16 or bfloat16) on the current device. Before the
// first call: loading would spoil a capture.
void load_plain_kernels(DType dtype);

// A row may have so many positions: sums of positions have 32 bits.
inline constexpr std::int64_t kMaxPlainPositions = std::int64_t{1} << 30;

// Enqueues and returns; several threads may call at once, on one stream too. `work.split` makes no
// difference.
void run_plain_layer(const LayerWork& work, const PlainPlace& place);

}  // namespace clusterfusion::cuda
