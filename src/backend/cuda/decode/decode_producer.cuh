// The producer of the streaming decode kernel: one thread of each block that copies into the ring
// what the dealer has announced.
#pragma once

#include "backend/cuda/decode/decode_common.cuh"

namespace clusterfusion::cuda {

template <typename Cache>
__device__ __forceinline__ void produce(const DecodeParams& p, const Cache& cache,
                                        SharedControl* control, char* ring_data) {
  RingProducer ring(&control->ring, ring_data, p.stages, p.stage_bytes, p.max_in_flight);
  int attention_id = kRingEnd;  // of the attention that may be copied
  while (true) {
    const RingOrder order = ring.next();
    if (order.id == kRingEnd) return;
    if (static_cast<Stream>(stream_of(order.id)) != Stream::attention) {
      ring.copy(order.bytes, [&](std::uint32_t target, std::uint32_t barrier) {
        bulk_copy_to_shared(target, pointer_to(order.source), order.bytes, barrier);
      });
      continue;
    }
    if (order.id != attention_id) {
      attention_id = order.id;
      // What earlier steps of this launch have written must be there before it is copied.
      const int written = epoch_of(order.id) - epochs_per_step(p);
      if (written >= 0) {
        block_counter_wait(&control->swept, written + 2);
        fence_before_bulk_copy();
      }
    }
    ring.copy(order.bytes, [&](std::uint32_t target, std::uint32_t barrier) {
      cache.copy(target, order, barrier);
    });
  }
}

}  // namespace clusterfusion::cuda
