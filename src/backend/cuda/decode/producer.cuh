// The producer of the streaming decode kernel: one thread of each block, or a warp (sync/ring.cuh),
// that copies into the ring what the work scheduler has announced.
#pragma once

#include "backend/cuda/decode/shared.cuh"

namespace clusterfusion::cuda {

template <typename Cache>
__device__ __forceinline__ void produce(const DecodeParams& p, const Cache& cache,
                                        SharedControl* control) {
  RingProducer ring(&control->ring, p.stages);
  int attention_id = kRingEnd;  // of the attention that may be copied
  while (true) {
    const RingTask task = ring.next();
    const int id = task.order.id;
    if (id == kRingEnd) return ring.finish();
    if (static_cast<Stream>(stream_of(id)) != Stream::attention) {
      ring.copy(task.order, [&](std::uint32_t barrier) {
        copy_to_stage(task.target, pointer_to(task.order.source), task.order.bytes, barrier);
      });
      continue;
    }
    if (id != attention_id) {
      attention_id = id;
      // What earlier steps of this launch have written must be there before it is copied.
      const int written = epoch_of(id) - epochs_per_step(p);
      if (written >= 0) {
        block_counter_wait(&control->cleared, written + 2);
        fence_before_bulk_copy();
      }
    }
    ring.copy(task.order, [&](std::uint32_t barrier) { cache.copy(task, barrier); });
  }
}

}  // namespace clusterfusion::cuda
