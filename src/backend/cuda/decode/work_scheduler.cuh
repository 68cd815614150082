// The work scheduler of the streaming decode kernel: one thread of each block that knows, before
// anything is computed, what has to be read, and announces it in the ring, a little ahead of the
// producer.
// With a chunk it brings the biases of the chunk's rows: consumers who had to fetch them would wait
// for them behind the weights.
//
// The chunks of a phase are assigned statically, round-robin, at first, and then dynamically, by
// ticket, because memory does not serve SMs equally. All of this block's attention comes with the
// second phase of a layer, in front of it; where few blocks have some, these leave the first phase
// early.
#pragma once

#include "backend/cuda/decode/shared.cuh"

namespace clusterfusion::cuda {

template <typename Cache, plan::LayerKind kKind = plan::LayerKind::plain>
class WorkScheduler {
 public:
  __device__ __forceinline__ WorkScheduler(const DecodeParams& params, const Cache& kv_cache,
                                           SharedControl* shared)
      : p(params),
        cache(kv_cache),
        control(shared),
        ring(&shared->ring, params.stages),
        counter(params.tickets) {}

  __device__ __forceinline__ void run() {
    const int phases = plan::layer_phases(p.parallel_residual);
    for (int index = 0; index < phases; ++index)
      control->phases[index] = schedule_of(plan::layer_phase(p.parallel_residual, index));
    control->phases[phases] = schedule_of({Stream::lm_head});
    int epoch = 0;
    for (int step = 0; step < p.steps; ++step) {
      const int position = p.first_position + step;
      const bool scored = step >= p.first_scored_step;
      plan::AttentionSplits own_splits;
      int own_leave_from;
      // Of layers of any kind in shared memory: registers are few, and what they spill comes back
      // behind the weights. Attention looks there too.
      plan::AttentionSplits& splits = kIsAny ? control->splits[step] : own_splits;
      int& leave_from = kIsAny ? control->leave_from : own_leave_from;
      splits = splits_at(p, position);
      leave_from = leaves_first_phase_from(splits);
#pragma unroll 1
      for (int layer = 0; layer < p.num_layers + scored; ++layer, ++epoch) {
        // One copy of the code for all phases: it must fit into few registers.
        const bool is_lm_head = layer == p.num_layers;
        int index = is_lm_head ? phases : 0;
        const int end = is_lm_head ? phases + 1 : phases;
#pragma unroll 1
        do {
          if (control->phases[index].attention_before) schedule_attention(layer, epoch, splits);
          schedule_phase(is_lm_head ? 0 : layer, epoch, control->phases[index], NoHooks{},
                         index > 0 ? kNever : leave_from);
        } while (++index < end);
      }
      epoch += !scored;
    }
    end();
  }

 protected:
  // How many stages are announced and have not landed, at most.
  __device__ __forceinline__ int reach(int in_flight) const {
    if constexpr (kIsAny) in_flight = max(in_flight, p.busy_in_flight);
    return min(in_flight + p.announced_ahead, p.stages);
  }

  __device__ __forceinline__ void end() {
    ring.wait_empty(reach(p.max_in_flight));
    ring.announce_end();
  }

  __device__ __forceinline__ SharedControl::PhaseSchedule schedule_of(
      const plan::Phase& phase) const {
    const auto chunks_of = [&](Stream stream) {
      return stream == Stream::none ? 0 : control->matrices[static_cast<int>(stream)].chunks;
    };
    const int chunks = chunks_of(phase.first) + chunks_of(phase.second);
    // Short phases are over before more copies under way could be of use.
    const bool is_long = chunks >= kLateChunks * static_cast<int>(gridDim.x);
    const plan::WorkSchedule schedule =
        plan::work_schedule(chunks, kIsAny && is_long ? p.long_static_percent : p.static_percent,
                            static_cast<std::int32_t>(gridDim.x));
    const int late_from = is_long ? chunks * p.late_percent / 100 : kNever;
    return {phase.first, phase.second,          chunks, schedule.first_dynamic,
            late_from,   phase.attention_before};
  }

  // A matrix of one layer, to be streamed as `id`.
  struct Piece {
    int id;
    const char* weights;
    const char* biases;
    int chunks;
    int chunk_bytes;
    int last_bytes;         // of the last chunk
    int first_stage_bytes;  // 0 if a chunk has one stage
    int chunk_bias_bytes;
    int bias_bytes;  // of all rows
  };
  __device__ __forceinline__ Piece piece(int layer, int epoch, Stream stream) const {
    const StreamedMatrix& matrix = control->matrices[static_cast<int>(stream)];
    const SharedControl::Source& source = control->sources[static_cast<int>(stream)];
    const int last_rows = matrix.rows - (matrix.chunks - 1) * matrix.rows_per_chunk;
    return {ring_id(epoch, stream),
            of_layer(p, source.weights, layer),
            source.biases == nullptr ? nullptr : of_layer(p, source.biases, layer),
            matrix.chunks,
            matrix.rows_per_chunk * matrix.row_bytes,
            last_rows * matrix.row_bytes,
            matrix.first_stage_bytes,
            matrix.rows_per_chunk * p.bias_element_bytes,
            matrix.rows * p.bias_element_bytes};
  }

  __device__ __forceinline__ bool is_gated(int id) const {
    if constexpr (kKind == plan::LayerKind::any)
      return stream_of(id) == static_cast<int>(Stream::mlp_up) && p.first_layer.mlp_gate != nullptr;
    return false;
  }

  __device__ __forceinline__ void schedule_chunk(const Piece& piece, int index, int in_flight) {
    std::int64_t offset = static_cast<std::int64_t>(index) * piece.chunk_bytes;
    // Of a gated MLP's chunk half comes from each of its matrices.
    if constexpr (kKind == plan::LayerKind::any) offset >>= is_gated(piece.id);
    const char* weights = piece.weights + offset;
    int bytes = index + 1 < piece.chunks ? piece.chunk_bytes : piece.last_bytes;
    int second_bytes = 0;  // in a second stage
    if constexpr (kKind == plan::LayerKind::any) {
      if (piece.first_stage_bytes > 0) {
        second_bytes = bytes - piece.first_stage_bytes;
        bytes = piece.first_stage_bytes;
      }
    }
    const std::uint32_t biases = ring.wait_empty(reach(in_flight)) + p.bias_offset;
    // Biases come by 16 bytes: the chunk's first may lie in the midst of them.
    const int first = index * piece.chunk_bias_bytes;
    control->chunks[chunks_scheduled++ % kKnownChunks] = index;
    ring.announce({static_cast<int>(biases) + (first & 15), 0},
                  {piece.id, static_cast<std::uint32_t>(bytes), address_of(weights), in_flight});
    // To the 16 bytes of the last: there are a multiple of 16 bytes of biases.
    const int begin = first & ~15;
    const int end = (min(first + piece.chunk_bias_bytes, piece.bias_bytes) + 15) & ~15;
    if (piece.biases == nullptr)
      ring.add(0, nullptr, 0);
    else
      ring.add(biases, piece.biases + begin, end - begin);
    if (second_bytes > 0) schedule_second_stage(piece.id, weights + bytes, second_bytes, in_flight);
  }
  __device__ __forceinline__ void schedule_second_stage(int id, const char* weights, int bytes,
                                                        int in_flight) {
    ring.wait_empty(reach(in_flight));
    ring.announce({}, {id, static_cast<std::uint32_t>(bytes), address_of(weights), in_flight});
    ring.add(0, nullptr, 0);
  }

  static constexpr int kLateChunks = 16;  // of a block, in a phase
  static constexpr bool kIsAny = kKind == plan::LayerKind::any;

  // From which of the first phase's chunks on this block draws no more tickets.
  __device__ __forceinline__ int leaves_first_phase_from(
      const plan::AttentionSplits& splits) const {
    const int tasks = p.num_kv_heads * splits.splits;
    const bool leaves = p.parallel_residual && cache.block_number() < tasks &&
                        plan::leaves_for_attention(tasks, p.head_dim, static_cast<int>(gridDim.x));
    return leaves ? plan::leave_for_attention_from(p.qkv.chunks, p.mlp_up.chunks) : kNever;
  }

  // What a caller of schedule_phase() may put in between.
  struct NoHooks {
    __device__ __forceinline__ void before_chunk(int) const {}
    // Whether to do the static share of another block, `number`, too.
    __device__ __forceinline__ bool next_late(int& number) const { return false; }
  };

  // One phase: this block's chunks of one matrix, or of two, one after the other. A ticket of chunk
  // `leave_from` or a later one is the last that it draws.
  template <typename Hooks = NoHooks>
  __device__ __forceinline__ void schedule_phase(int layer, int epoch,
                                                 const SharedControl::PhaseSchedule& phase,
                                                 Hooks&& hooks = {}, int leave_from = kNever) {
    const int chunks = phase.chunks, first_dynamic = phase.first_dynamic;
    // Chunks come in ascending order: those of the first matrix, then those of the second.
    Piece current = piece(layer, epoch, phase.first);
    const Stream second = phase.second;
    int before = 0;  // chunks of the phase before the current matrix
    int next_from = second == Stream::none ? kNever : current.chunks;
    int begin = cache.block_number(), end = first_dynamic;
    int stride = static_cast<int>(gridDim.x);
    bool leaves = false;
    while (true) {
#pragma unroll 1
      for (int chunk = begin; chunk < end; chunk += stride) {
        hooks.before_chunk(chunk);
        if (chunk >= next_from) {
          before = next_from;
          next_from = kNever;
          current = piece(layer, epoch, second);
        }
        schedule_chunk(current, chunk - before,
                       chunk < phase.late_from ? p.max_in_flight : p.late_in_flight);
      }
      if (leaves) break;
      if (hooks.next_late(begin))
        continue;  // `end` and `stride` are still those of the static share
      begin = first_dynamic + static_cast<int>(atomicAdd(counter, p.ticket_chunks));
      if (begin >= chunks) break;
      end = min(begin + static_cast<int>(p.ticket_chunks), chunks);
      stride = 1;
      leaves = begin >= leave_from;
    }
    // Every phase of every step has a counter of its own: this scheduler may be a step ahead of
    // another that has not drawn its last ticket yet.
    ++counter;
  }

  __device__ __forceinline__ void schedule_attention(int layer, int epoch,
                                                     const plan::AttentionSplits& splits) {
    schedule_attention(layer, epoch, splits, cache.block_number());
  }
  // The tasks of block `number`.
  __device__ __forceinline__ void schedule_attention(int layer, int epoch,
                                                     const plan::AttentionSplits& splits,
                                                     int number) {
    const int tasks = p.num_kv_heads * splits.splits;
    for (int task = number; task < tasks; task += static_cast<int>(gridDim.x)) {
      const int head = task / splits.splits;
      const int first = task % splits.splits * splits.blocks_per_split;
      const int end = min(first + splits.blocks_per_split, splits.blocks);
      typename Cache::Reader reader(cache, layer, head, first, end);
#pragma unroll 1
      for (int block = first; block < end; ++block) {
        ring.wait_empty(reach(p.max_in_flight));
        ring.announce({task, block}, {ring_id(epoch, Stream::attention),
                                      static_cast<std::uint32_t>(p.kv_block_bytes),
                                      reader.source(block), p.max_in_flight});
        ring.add(0, nullptr, 0);
      }
    }
  }

  const DecodeParams& p;
  const Cache& cache;
  SharedControl* control;
  RingScheduler ring;
  std::uint32_t* counter;
  unsigned chunks_scheduled = 0;  // of all matrices
};

}  // namespace clusterfusion::cuda
