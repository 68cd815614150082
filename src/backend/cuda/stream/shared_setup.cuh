// Fills shared memory when a launch begins: barriers, the phases of a layer with their operands,
// and the rows.
#pragma once

#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

class SharedSetup {
 public:
  // `vectors`: so many input vectors of all rows fit into registers side by side.
  __device__ __forceinline__ SharedSetup(const StreamParams& params, char* shared, int vectors)
      : p(params),
        control(shared_control(shared)),
        ring_data(shared_ring(params, shared)),
        vectors_at_once(vectors) {}

  // By all threads, before a block barrier.
  __device__ __forceinline__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) init_barriers();
    if (thread == 32) init_phases();
    for (int row = thread; row < p.rows; row += kStreamBlockThreads)
      control->rows[row] = p.row_table[row];
    for (int group = thread; group < p.groups; group += kStreamBlockThreads)
      control->groups[group] = p.group_table[group];
  }

 private:
  __device__ __forceinline__ void init_barriers() {
    ring_init(&control->ring, ring_data, p.stages, p.stage_bytes, plan::kConsumerWarps);
    constexpr int kArrivals = kEveryLaneArrives ? 32 : 1;
    for (int buffer = 0; buffer < plan::kPartialBuffers; ++buffer) {
      mbarrier_init(&control->partial_full[buffer], plan::kConsumerWarps * kArrivals);
      mbarrier_init(&control->partial_empty[buffer], kArrivals);
    }
    mbarrier_fence_init();
    control->zeros = make_uint4(0, 0, 0, 0);
    control->begun = control->cleared = 0;
  }

  __device__ __forceinline__ void init_phases() {
    const int phases = plan::layer_phases(p.parallel_residual);
    for (int index = 0; index < phases; ++index)
      init_phase(index, plan::layer_phase(p.parallel_residual, index));
    init_phase(phases, {Stream::lm_head});
  }

  __device__ __forceinline__ void init_phase(int index, const plan::Phase& of_plan) {
    StreamPhase& phase = control->phases[index];
    phase = {};
    phase.attention_before = of_plan.attention_before;
    phase.normalizes = of_plan.first == Stream::qkv || of_plan.first == Stream::mlp_up ||
                       of_plan.first == Stream::lm_head;
    add_operands(index, of_plan.first);
    phase.second_product = phase.operands;
    if (of_plan.second != Stream::none) add_operands(index, of_plan.second);
    phase.fits = phase.slots <= vectors_at_once;
    if (!phase.fits)
      for (int number = 0; number < phase.operands; ++number)
        control->operands[index][number].first_slot = number % vectors_at_once;
    phase.rotates = !phase.fits && !phase.normalizes;
    const int blocks = static_cast<int>(gridDim.x);
    // Short phases are over before more copies under way could be of use, and have too few chunks
    // for tickets of many.
    constexpr int kLongChunks = 8;  // of a block, in a phase
    const bool is_long = phase.chunks >= kLongChunks * blocks;
    phase.static_percent = is_long ? p.long_static_percent : p.static_percent;
    phase.first_dynamic =
        plan::work_schedule(phase.chunks, phase.static_percent, blocks).first_dynamic;
    phase.ticket_chunks = max(1, min(phase.ticket_chunks, phase.chunks / (3 * blocks)));
    phase.late_from =
        is_long ? static_cast<int>(static_cast<std::int64_t>(phase.chunks) * p.late_percent / 100)
                : kNever;
  }

  __device__ __forceinline__ void add_operands(int index, Stream stream) {
    StreamPhase& phase = control->phases[index];
    const StreamedProduct product = product_of(stream);
    const int chunk_bytes = plan::kChunkRows * product.pieces * product.piece_bytes;
    phase.ticket_chunks = max(1, p.ticket_bytes / chunk_bytes);
    // Folded parts are rows of a matrix that is as many times as high.
    const bool folds = stream == Stream::mlp_down && p.folds_parts;
    const int operands = folds ? 1 : product.parts;
    for (int part = 0; part < operands; ++part) {
      Operand operand{};
      operand.weights = weights_of(stream) + part * product.part_bytes;
      operand.biases = part == 0 ? biases_of(stream) : nullptr;
      operand.source_part_bytes = product.part_bytes * p.layout.input_rows;
      operand.source = source_of(stream) + part * operand.source_part_bytes;
      operand.output = output_of(stream, part);
      operand.stream = stream;
      operand.slots = folds ? product.parts : 1;
      operand.first_slot = phase.slots;
      operand.chunks = product.chunks * operand.slots;
      operand.rows = product.rows * operand.slots;
      operand.pieces = product.pieces;
      operand.iterations = product.iterations;
      operand.piece_steps = product.piece_steps;
      operand.copy = {product.piece_bytes, folds ? product.part_bytes : product.row_bytes,
                      product.row_pitch};
      operand.chunk_stride = plan::kChunkRows * operand.copy.row_bytes;
      operand.bias_stride = plan::kChunkRows * 4 / operand.slots;
      operand.stage_copy_bytes = plan::kChunkRows * product.piece_bytes;
      operand.last_copy_bytes =
          (operand.rows - (operand.chunks - 1) * plan::kChunkRows) * product.piece_bytes;
      operand.parts = operands;
      control->operands[index][phase.operands++] = operand;
      phase.chunks += operand.chunks;
      phase.slots += operand.slots;
    }
  }

  __device__ __forceinline__ StreamedProduct product_of(Stream stream) const {
    switch (stream) {
      case Stream::qkv: return p.qkv;
      case Stream::mlp_up: return p.mlp_up;
      case Stream::mlp_down: return p.mlp_down;
      case Stream::attention_out: return p.attention_out;
      default: return p.lm_head;
    }
  }
  __device__ __forceinline__ const char* weights_of(Stream stream) const {
    switch (stream) {
      case Stream::qkv: return p.first_layer.qkv;
      case Stream::mlp_up: return p.first_layer.mlp_up;
      case Stream::mlp_down: return p.first_layer.mlp_down;
      case Stream::attention_out: return p.first_layer.attention_out;
      default: return p.lm_head_weight;
    }
  }
  __device__ __forceinline__ const char* biases_of(Stream stream) const {
    switch (stream) {
      case Stream::qkv: return p.first_layer.qkv_bias;
      case Stream::mlp_up: return p.first_layer.mlp_up_bias;
      case Stream::mlp_down: return p.first_layer.mlp_down_bias;
      case Stream::attention_out: return p.first_layer.attention_out_bias;
      default: return nullptr;
    }
  }
  __device__ __forceinline__ int source_of(Stream stream) const {
    switch (stream) {
      case Stream::mlp_up: return p.layout.post_norm;
      case Stream::mlp_down: return p.layout.mlp;
      case Stream::attention_out: return p.layout.attention;
      default: return p.layout.input_norm;
    }
  }
  __device__ __forceinline__ int output_of(Stream stream, int part) const {
    const int part_bytes = p.rows * p.hidden_size * 4;
    switch (stream) {
      case Stream::qkv: return p.layout.qkv;
      case Stream::mlp_up: return p.layout.mlp;
      case Stream::mlp_down: return p.layout.residual + part * part_bytes;
      case Stream::attention_out: return p.layout.residual + mlp_vectors(p) * part_bytes;
      default: return 0;
    }
  }

  const StreamParams& p;
  StreamShared* control;
  char* ring_data;
  int vectors_at_once;
};

}  // namespace clusterfusion::cuda::stream
