// The work scheduler: one thread of each block that knows, before anything is computed, what has to
// be read, and announces it in the ring, a little ahead of the producer. With the last piece of a
// chunk it brings the biases of the chunk's rows: whoever had to fetch them would wait for them
// behind the weights.
//
// The chunks of a phase are assigned statically, round-robin, at first, and then dynamically, by
// ticket, because memory does not serve SMs equally. Where not all of a phase's input vectors fit
// into registers, each block begins with another one of them, and helps with the next when there
// are no more chunks of that. A block's share of attention comes in front of the phase that needs
// it.
#pragma once

#include "backend/cuda/stream/attention_schedule.cuh"

namespace clusterfusion::cuda::stream {

class WorkScheduler {
 public:
  __device__ __forceinline__ WorkScheduler(const StreamParams& params, StreamShared* shared)
      : p(params), control(shared), ring(&shared->ring, params.stages), counter(params.tickets) {}

  __device__ __forceinline__ void run() {
    const int phases = plan::layer_phases(p.parallel_residual);
    int epoch = 0;
    for (int step = 0; step < p.steps; ++step) {
      plan_attention(step);
#pragma unroll 1
      for (int layer = 0; layer <= p.num_layers; ++layer, ++epoch) {
        const bool is_lm_head = layer == p.num_layers;
        const int end = is_lm_head ? phases + 1 : phases;
#pragma unroll 1
        for (int index = is_lm_head ? phases : 0; index < end; ++index) {
          const StreamPhase& phase = control->phases[index];
          layer_offset = is_lm_head ? 0 : layer * p.layer_stride;
          if (phase.attention_before) schedule_attention(layer, epoch);
          schedule_phase(index, phase_id(epoch, index));
        }
      }
    }
    ring.wait_empty(reach(p.max_in_flight));
    ring.announce_end();
  }

 private:
  // How many stages are announced and have not landed, at most.
  __device__ __forceinline__ int reach(int in_flight) const {
    return min(in_flight + p.announced_ahead, p.stages);
  }
  __device__ __forceinline__ static int block_number() { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ static int blocks() { return static_cast<int>(gridDim.x); }

  // Every phase of every step has counters of its own: this scheduler may be a step ahead of
  // another that has not drawn its last ticket yet.
  __device__ __forceinline__ void schedule_phase(int index, int id) {
    const StreamPhase& phase = control->phases[index];
    if (phase.rotates) {
      for (int round = 0; round < phase.operands; ++round) {
        const int operand = (block_number() + round) % phase.operands;
        schedule_operand(phase, control->operands[index], operand, id, round == 0);
      }
    } else {
      schedule_in_order(phase, index, id);
    }
    counter += kMaxOperands;
  }

  // What must be known of an operand to schedule its chunks, in registers.
  struct Chunks {
    const char* weights;
    const char* biases;
    int id, count, pieces, piece_bytes, chunk_stride, bias_stride, copy_bytes, last_copy_bytes;
  };
  __device__ __forceinline__ Chunks chunks_of(const Operand& operand, int id) const {
    return {operand.weights + layer_offset,
            operand.biases == nullptr ? nullptr : operand.biases + layer_offset,
            id,
            operand.chunks,
            operand.pieces,
            operand.copy.bytes,
            operand.chunk_stride,
            operand.bias_stride,
            operand.stage_copy_bytes,
            operand.last_copy_bytes};
  }

  // All operands of a phase, one after the other.
  __device__ __forceinline__ void schedule_in_order(const StreamPhase& phase, int index, int id) {
    const Operand* operands = control->operands[index];
    int number = 0;
    Chunks current = chunks_of(operands[0], ring_id(id, 0));
    int before = 0;                 // chunks of the phase before the current operand
    int next_from = current.count;  // where the next one begins
    const int chunks = phase.chunks, ticket_chunks = phase.ticket_chunks;
    const int late_from = phase.late_from;
    int begin = block_number(), end = phase.first_dynamic, stride = blocks();
    while (true) {
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += stride) {
#pragma unroll 1
        while (chunk >= next_from) {
          ++number;
          current = chunks_of(operands[number], ring_id(id, number));
          before = next_from;
          next_from += current.count;
        }
        schedule_chunk(current, chunk - before,
                       chunk < late_from ? p.max_in_flight : p.late_in_flight);
      }
      begin = phase.first_dynamic + static_cast<int>(atomicAdd(counter, ticket_chunks));
      if (begin >= chunks) return;
      end = min(begin + ticket_chunks, chunks);
      stride = 1;
    }
  }

  // One operand of a phase that rotates. Blocks that begin with it have a static share of it.
  __device__ __forceinline__ void schedule_operand(const StreamPhase& phase,
                                                   const Operand* operands, int number, int id,
                                                   bool begins) {
    const Chunks chunks = chunks_of(operands[number], ring_id(id, number));
    const int sharers = (blocks() - number + phase.operands - 1) / phase.operands;
    const int first_dynamic =
        plan::work_schedule(chunks.count, phase.static_percent, sharers).first_dynamic;
    const int ticket_chunks = phase.ticket_chunks;
    int begin = begins ? block_number() / phase.operands : first_dynamic;
    int end = first_dynamic, stride = sharers;
    while (true) {
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += stride)
        schedule_chunk(chunks, chunk, p.max_in_flight);
      begin = first_dynamic + static_cast<int>(atomicAdd(counter + number, ticket_chunks));
      if (begin >= chunks.count) return;
      end = min(begin + ticket_chunks, chunks.count);
      stride = 1;
    }
  }

  __device__ __forceinline__ void schedule_chunk(const Chunks& chunks, int chunk, int in_flight) {
    const char* source = chunks.weights + static_cast<std::int64_t>(chunk) * chunks.chunk_stride;
    const auto bytes = static_cast<std::uint32_t>(
        chunk + 1 < chunks.count ? chunks.copy_bytes : chunks.last_copy_bytes);
    // Biases come by 16 bytes: the chunk's first may lie amid them.
    const int bias_begin = chunk * chunks.bias_stride;
    const int label = chunks.biases == nullptr ? 0 : 1 | (bias_begin & 15) << 1;
#pragma unroll 1
    for (int left = chunks.pieces; left > 0; --left) {
      const std::uint32_t data = ring.wait_empty(reach(in_flight));
      ring.announce({chunk, label}, {chunks.id, bytes, address_of(source), in_flight});
      if (left == 1 && label != 0)
        ring.add(data + p.bias_offset, chunks.biases + (bias_begin & ~15),
                 max(chunks.bias_stride, 16));
      else
        ring.add(0, nullptr, 0);
      source += chunks.piece_bytes;
    }
  }

  // What attention consists of in this step: once, as divisions take this thread long.
  __device__ __forceinline__ void plan_attention(int step) {
    int before = 0;
    for (int index = 0; index < p.groups; ++index) {
      control->splits[index] = splits_of_group(p, *control, index, step);
      control->task_of_group[index] = task_of_block(before);
      control->cached[index] = control->rows[control->groups[index].sequence_first].position + step;
      before += p.num_heads * control->splits[index].splits;
    }
  }

  __device__ __forceinline__ void schedule_attention(int layer, int epoch) {
    for (int group = 0; group < p.groups; ++group)
      if (control->task_of_group[group] < p.num_heads * control->splits[group].splits)
        schedule_task(layer, epoch, group, control->task_of_group[group]);
  }
  __device__ __forceinline__ void schedule_task(int layer, int epoch, int group, int task) {
    const plan::AttentionSplits splits = control->splits[group];
    char* const* pages = control->rows[control->groups[group].first_row].kv_pages;
    const int head = task / splits.splits, split = task % splits.splits;
    const int first = split * splits.blocks_per_split;
    const int end = min(first + splits.blocks_per_split, splits.blocks);
    const int cached = control->cached[group];
    const char* next = kv_block(p, pages, layer, head, first);
#pragma unroll 1
    for (int block = first; block < end; ++block) {
      // The page table is in global memory, so this looks one block ahead.
      const char* source = next;
      next = kv_block(p, pages, layer, head, min(block + 1, end - 1));
      const int positions =
          min(max(cached - block * p.kv_block_positions, 0), p.kv_block_positions);
      ring.wait_empty(reach(p.max_in_flight));
      ring.announce({block, end}, {ring_id(phase_id(epoch, kAttentionPhase), 0),
                                   static_cast<std::uint32_t>(positions * p.head_dim * 4),
                                   address_of(source), p.max_in_flight});
      ring.add(0, nullptr, 0);
    }
  }

  const StreamParams& p;
  StreamShared* control;
  RingScheduler ring;
  std::uint32_t* counter;
  std::int64_t layer_offset = 0;
};

}  // namespace clusterfusion::cuda::stream
