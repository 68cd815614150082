// The producer of the streaming decode kernel: one thread of each block that knows, before anything
// is computed, what has to be read, and keeps the ring filled.
//
// The chunks of a phase are dealt out in turns at first, then by ticket, because SMs are not served
// equally. All of this block's attention comes with the second phase of a layer, in front of it;
// where few blocks have some, these leave the first phase early.
#pragma once

#include "backend/cuda/decode/decode_common.cuh"

namespace clusterfusion::cuda {

template <typename Cache>
class DecodeProducer {
 public:
  __device__ __forceinline__ DecodeProducer(const DecodeParams& params, const Cache& kv_cache,
                                            SharedControl* shared, char* ring_data)
      : p(params),
        cache(kv_cache),
        control(shared),
        ring(&shared->ring, ring_data, params.stages, params.stage_bytes, params.max_in_flight),
        counter(params.tickets) {}

  __device__ __forceinline__ void run() {
    int epoch = 0;
    for (int step = 0; step < p.steps; ++step) {
      const int position = p.first_position + step;
      const bool scored = step >= p.first_scored_step;
      const int leave_from = leaves_first_phase_from(position);
#pragma unroll 1
      for (int layer = 0; layer < p.num_layers + scored; ++layer, ++epoch) {
        // One copy of the code for all phases: it must fit into few registers.
        const bool head = layer == p.num_layers;
        const int phases = head ? 1 : plan::layer_phases(p.parallel_residual);
#pragma unroll 1
        for (int index = 0; index < phases; ++index) {
          const plan::Phase phase =
              head ? plan::Phase{Stream::lm_head} : plan::layer_phase(p.parallel_residual, index);
          if (phase.attention_before) stream_attention(layer, epoch, position);
          stream(layer, epoch, phase, NoHooks{}, head || index > 0 ? kNever : leave_from);
        }
      }
      epoch += !scored;
    }
    ring.announce(kRingEnd, {});
  }

 protected:
  __device__ __forceinline__ const StreamedMatrix& matrix_of(Stream stream) const {
    switch (stream) {
      case Stream::qkv: return p.qkv;
      case Stream::mlp_up: return p.mlp_up;
      case Stream::mlp_down: return p.mlp_down;
      case Stream::attention_out: return p.attention_out;
      default: return p.lm_head;
    }
  }

  __device__ __forceinline__ const char* weights_of(int layer, Stream stream) const {
    if (stream == Stream::lm_head) return p.lm_head_weight;
    const StreamedLayer weights = layer_at(p, layer);
    switch (stream) {
      case Stream::qkv: return weights.qkv;
      case Stream::mlp_up: return weights.mlp_up;
      case Stream::mlp_down: return weights.mlp_down;
      default: return weights.attention_out;
    }
  }

  // A matrix of one layer, to be streamed as `id`.
  struct Piece {
    int id;
    const char* weights;
    int chunks;
    int chunk_bytes;
    int last_bytes;  // of the last chunk
  };
  __device__ __forceinline__ Piece piece(int layer, int epoch, Stream stream) const {
    const StreamedMatrix& matrix = matrix_of(stream);
    const int last_rows = matrix.rows - (matrix.chunks - 1) * matrix.rows_per_chunk;
    return {ring_id(epoch, stream), weights_of(layer, stream), matrix.chunks,
            matrix.rows_per_chunk * matrix.row_bytes, last_rows * matrix.row_bytes};
  }

  __device__ __forceinline__ void stream_chunk(const Piece& piece, int index) {
    ring.announce(piece.id, {index, 0});
    ring.copy(piece.weights + static_cast<std::int64_t>(index) * piece.chunk_bytes,
              index + 1 < piece.chunks ? piece.chunk_bytes : piece.last_bytes);
  }

  static constexpr int kNever = 0x7fffffff;

  // From which of the first phase's chunks on this block draws no more tickets.
  __device__ __forceinline__ int leaves_first_phase_from(int position) const {
    const int tasks = p.num_heads * splits_at(p, position).splits;
    const bool leaves = p.parallel_residual && static_cast<int>(blockIdx.x) < tasks &&
                        plan::leaves_for_attention(tasks, p.head_dim, static_cast<int>(gridDim.x));
    return leaves ? plan::leave_for_attention_from(p.qkv.chunks, p.mlp_up.chunks) : kNever;
  }

  // What a caller of stream() may put in between.
  struct NoHooks {
    __device__ __forceinline__ void before_chunk(int) const {}
    __device__ __forceinline__ void before_ticket() const {}
  };

  // One phase: this block's chunks of one matrix, or of two, one after the other. A ticket of chunk
  // `leave_from` or a later one is the last that it draws.
  template <typename Hooks = NoHooks>
  __device__ __forceinline__ void stream(int layer, int epoch, const plan::Phase& phase,
                                         Hooks&& hooks = {}, int leave_from = kNever) {
    const Piece first = piece(layer, epoch, phase.first);
    Piece second = piece(layer, epoch, phase.second);
    if (phase.second == Stream::none) second.chunks = 0;
    const int chunks = first.chunks + second.chunks;
    const plan::Deal deal =
        plan::deal(chunks, p.static_percent, static_cast<std::int32_t>(gridDim.x));
    // A ticket takes as long to come as a chunk: it is asked for one round ahead, the first when a
    // chunk is on its way, and nothing may touch it before.
    std::uint32_t ticket = 0;
    bool asked = false;
    const auto ask_first = [&] {
      if (asked) return;
      hooks.before_ticket();
      ticket = atomicAdd(counter, p.ticket_chunks);
      asked = true;
    };
    int begin = static_cast<int>(blockIdx.x), end = deal.first_by_ticket;
    int stride = static_cast<int>(gridDim.x);
    bool leaves = false;
    while (true) {
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += stride) {
        hooks.before_chunk(chunk);
        if (chunk < first.chunks)
          stream_chunk(first, chunk);
        else
          stream_chunk(second, chunk - first.chunks);
        ask_first();
      }
      if (leaves) break;
      ask_first();
      begin = deal.first_by_ticket + static_cast<int>(not_before_here(ticket));
      if (begin >= chunks) break;
      end = min(begin + static_cast<int>(p.ticket_chunks), chunks);
      stride = 1;
      leaves = begin >= leave_from;
      if (!leaves) ticket = atomicAdd(counter, p.ticket_chunks);
    }
    // Every phase of every step has a counter of its own: this producer may be a step ahead of
    // another that has not drawn its last ticket yet.
    ++counter;
  }

  __device__ __forceinline__ void stream_attention(int layer, int epoch, int position) {
    const plan::AttentionSplits splits = splits_at(p, position);
    const int tasks = p.num_heads * splits.splits;
    for (int task = static_cast<int>(blockIdx.x); task < tasks;
         task += static_cast<int>(gridDim.x)) {
      const int head = task / splits.splits;
      const int first = task % splits.splits * splits.blocks_per_split;
      const int end = min(first + splits.blocks_per_split, splits.blocks);
      typename Cache::Reader reader(cache, layer, head, first, end);
#pragma unroll 1
      for (int block = first; block < end; ++block) {
        ring.announce(ring_id(epoch, Stream::attention), {task, block});
        // What earlier steps of this launch have written must be there before it is copied.
        const int written = epoch - epochs_per_step(p);
        if (written >= 0) {
          block_counter_wait(&control->swept, written + 2);
          fence_before_bulk_copy();
        }
        reader.copy(ring, block);
      }
    }
  }

  const DecodeParams& p;
  const Cache& cache;
  SharedControl* control;
  RingProducer ring;
  std::uint32_t* counter;
};

}  // namespace clusterfusion::cuda
