// The sweeper of the streaming decode kernel: one warp of each block that makes flow sets usable
// again, off the path of the computation.
//
// A block begins epoch e when it has read all that earlier epochs left it. When all blocks have
// begun epoch e, nobody reads set e - 1 any more: the sweepers empty it, each its share. That is
// done before they arrive at epoch e + 1, so whoever knows that all have arrived there may use the
// set again, which is the set of epoch e + 2.
#pragma once

#include "backend/cuda/decode/decode_common.cuh"

namespace clusterfusion::cuda {

__device__ __forceinline__ void sweep(const DecodeParams& p, SharedControl* control, int lane) {
  static_assert(kFlowSets == 3);
  constexpr unsigned kNap = 100;
  const int epochs = p.steps * epochs_per_step(p);
  for (int epoch = 0; epoch < epochs; ++epoch) {
    if (lane == 0) {
      block_counter_wait(&control->begun, epoch + 1, kNap);
      counter_add_release(p.arrivals, 1);
      counter_wait(p.arrivals, (epoch + 1) * gridDim.x);
      block_counter_store(&control->swept, epoch + 1);
    }
    __syncwarp();
    if (epoch == 0) continue;
    char* set = flow_set(p, epoch - 1);
    const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
    for (int offset = (static_cast<int>(blockIdx.x) * 32 + lane) * 16; offset < p.layout.bytes;
         offset += static_cast<int>(gridDim.x) * 32 * 16)
      *reinterpret_cast<uint4*>(set + offset) = empty;
    __syncwarp();
  }
}

}  // namespace clusterfusion::cuda
