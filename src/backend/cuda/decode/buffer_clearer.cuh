// The buffer clearer of the streaming kernels: one warp of each block that clears the Lamport
// buffers of past epochs, off the critical path, and prefetches what the next epoch needs into L2.
//
// A block begins epoch e when it has read all that earlier epochs left it. When all blocks have
// begun epoch e, nobody reads set e - 1 any more: the clearers clear it, each its share. That is
// done before they arrive at epoch e + 1, so whoever knows that all have arrived there may use the
// set again, which is the set of epoch e + 2.
#pragma once

#include "backend/cuda/decode/epoch.cuh"
#include "backend/cuda/ptx/bulk_copy.cuh"
#include "backend/cuda/sync/counter.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"

namespace clusterfusion::cuda {

using namespace device;

// Prefetches the norms' parameters of an epoch into L2, where all blocks load them at the same
// time: a vector each by the first blocks.
template <typename Params>
__device__ __forceinline__ void prefetch_norms(const Params& p, int epoch) {
  if (blockIdx.x > 5) return;
  const int layer = epoch % epochs_per_step(p);
  const bool is_final = layer == p.num_layers;
  if (is_final && blockIdx.x > 1) return;
  const StreamedLayer& first = p.first_layer;
  const void* of_first = blockIdx.x == 0   ? first.input_norm_weight
                         : blockIdx.x == 1 ? first.input_norm_bias
                         : blockIdx.x == 2 ? first.post_norm_weight
                         : blockIdx.x == 3 ? first.post_norm_bias
                         : blockIdx.x == 4 ? first.query_norm_weight
                                           : first.key_norm_weight;
  if (of_first == nullptr) return;
  const void* vector = of_layer(p, of_first, layer);
  if (is_final) vector = blockIdx.x == 0 ? p.final_norm_weight : p.final_norm_bias;
  bulk_prefetch(vector, (blockIdx.x < 4 ? p.hidden_size : p.head_dim) * 2);
}

// then(epoch): what else the warp does in each epoch, whose buffers are clear.
template <typename Params, typename Control, typename Then>
__device__ __forceinline__ void clear_buffers(const Params& p, Control* control, int lane,
                                              Then&& then) {
  static_assert(kLamportSets == 3);
  const int epochs = p.steps * epochs_per_step(p);
  for (int epoch = 0; epoch < epochs; ++epoch) {
    if (lane == 0) {
      block_counter_wait(&control->begun, epoch + 1, kBackoffNanoseconds);
      counter_add_release(p.arrivals, 1);
      counter_wait(p.arrivals, (epoch + 1) * gridDim.x);
      block_counter_store(&control->cleared, epoch + 1);
      prefetch_norms(p, epoch + 1);
    }
    __syncwarp();
    if (epoch > 0) {
      char* set = lamport_set(p, epoch - 1);
      const uint4 not_ready = make_uint4(kNotReady, kNotReady, kNotReady, kNotReady);
      for (int offset = (static_cast<int>(blockIdx.x) * 32 + lane) * 16; offset < p.layout.bytes;
           offset += static_cast<int>(gridDim.x) * 32 * 16)
        *reinterpret_cast<uint4*>(set + offset) = not_ready;
      __syncwarp();
    }
    then(epoch);
  }
}
template <typename Params, typename Control>
__device__ __forceinline__ void clear_buffers(const Params& p, Control* control, int lane) {
  clear_buffers(p, control, lane, [](int) {});
}

}  // namespace clusterfusion::cuda
