// The producer: one thread of each block, or a warp (sync/ring.cuh), that copies into the ring what
// the scheduler has announced. The rows of a chunk's piece are copied one by one, so that they lie
// a little apart in shared memory and the consumers' loads hit different banks.
#pragma once

#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

__device__ __forceinline__ void copy_piece(const Operand::Copy& copy, const RingTask& task,
                                           const StageCopies& copies) {
  const std::uint32_t row_bytes = copy.bytes;
  const char* source = pointer_to(task.order.source);
  std::uint32_t target = task.target;
  if (task.order.bytes == plan::kChunkRows * row_bytes) {
#pragma unroll
    for (int row = 0; row < plan::kChunkRows; ++row)
      copy_to_stage(target + row * copy.row_pitch,
                    source + static_cast<std::int64_t>(row) * copy.row_bytes, row_bytes, copies);
    return;
  }
  for (std::uint32_t done = 0; done < task.order.bytes; done += row_bytes) {
    copy_to_stage(target, source, row_bytes, copies);
    target += copy.row_pitch;
    source += copy.row_bytes;
  }
}

// As many keys, and as many values, of a KV block as are in the cache.
__device__ __forceinline__ void copy_kv_block(const StreamParams& p, const RingTask& task,
                                              const StageCopies& copies) {
  const std::uint32_t bytes = task.order.bytes / 2;
  if (bytes == 0) return;
  const char* source = pointer_to(task.order.source);
  const std::uint32_t values = p.kv_block_bytes / 2;
  copy_to_stage(task.target, source, bytes, copies);
  copy_to_stage(task.target + values, source + values, bytes, copies);
}

__device__ __forceinline__ void produce(const StreamParams& p, StreamShared* control) {
  RingProducer ring(&control->ring, p.stages, p.reads_once);
  int attention_id = kRingEnd;  // of the attention that may be copied
  while (true) {
    const RingTask task = ring.next();
    const int id = task.order.id;
    if (id == kRingEnd) return ring.finish();
    if (phase_of(id) != kAttentionPhase) {
      // Looked up before the wait for an earlier copy.
      const Operand::Copy copy = control->operands[phase_of(id)][operand_of(id)].copy;
      ring.copy(task.order, [&](const StageCopies& copies) { copy_piece(copy, task, copies); });
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
    ring.copy(task.order, [&](const StageCopies& copies) { copy_kv_block(p, task, copies); });
  }
}

}  // namespace clusterfusion::cuda::stream
