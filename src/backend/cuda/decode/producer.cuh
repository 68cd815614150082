// The producer of the streaming decode kernel: one thread of each block, or a warp (sync/ring.cuh),
// that copies into the ring what the work scheduler has announced.
#pragma once

#include "backend/cuda/decode/shared.cuh"

namespace clusterfusion::cuda {

// A chunk of a matrix. Of a gated MLP's first matrices it comes from both.
template <plan::LayerKind kKind>
__device__ __forceinline__ void copy_chunk(const DecodeParams& p, const RingTask& task,
                                           const StageCopies& copies) {
  const char* source = pointer_to(task.order.source);
  std::uint32_t bytes = task.order.bytes;
  if constexpr (kKind == plan::LayerKind::any) {
    const StreamedLayer& layer = p.first_layer;
    if (stream_of(task.order.id) == static_cast<int>(Stream::mlp_up) && layer.mlp_gate != nullptr) {
      bytes /= 2;
      // Behind the gate's rows of a whole chunk, which the last may have fewer of.
      const int offset = p.mlp_up.rows_per_chunk / 2 * p.mlp_up.row_bytes;
      copy_to_stage(task.target + offset, source + (layer.mlp_up - layer.mlp_gate), bytes, copies);
    }
  }
  copy_to_stage(task.target, source, bytes, copies);
}

template <plan::LayerKind kKind = plan::LayerKind::plain, typename Cache>
__device__ __forceinline__ void produce(const DecodeParams& p, const Cache& cache,
                                        SharedControl* control) {
  RingProducer ring(&control->ring, p.stages, p.reads_once);
  int attention_id = kRingEnd;  // of the attention that may be copied
  while (true) {
    RingTask task = ring.next();
    const int id = task.order.id;
    if constexpr (kKind == plan::LayerKind::any)
      if (block_counter_load(&control->multiplies) != 0)
        task.order.in_flight = max(task.order.in_flight, p.busy_in_flight);
    if (id == kRingEnd) return ring.finish();
    if (static_cast<Stream>(stream_of(id)) != Stream::attention) {
      ring.copy(task.order, [&](const StageCopies& copies) { copy_chunk<kKind>(p, task, copies); });
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
    ring.copy(task.order, [&](const StageCopies& copies) { cache.copy(task, copies); });
  }
}

}  // namespace clusterfusion::cuda
