// The products of a phase, by the consumer warps: weights as operand B as they land, the rows'
// input vectors as operand A, from registers. The warps share the columns of each chunk; the
// reducers add up what the warps have.
#pragma once

#include <type_traits>

#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/consumer.cuh"
#include "backend/cuda/stream/partial_sums.cuh"

namespace clusterfusion::cuda::stream {

template <typename T, int kOperandRows, int kPieces>
class MatrixProduct {
 public:
  using Inputs = Activations<kOperandRows, kPieces>;

  __device__ __forceinline__ explicit MatrixProduct(Consumer& consumer)
      : c(consumer), partials(consumer.control, consumer.scratch) {}

  // Multiplies all chunks of phase `index` that come next.
  __device__ __forceinline__ void run(int index, StreamPoint first_input) {
    c.make_indices_opaque();
    inputs.clear();
    held = kNothing;
    const StreamPhase& phase = c.control->phases[index];
    const int id = phase_id(c.epoch, index);
    fits = phase.fits;
    if (phase.normalizes && keeps_residual_everywhere(c.p)) load_normalised(index);
    bool first = true;
#pragma unroll 1
    while (phase_id_of(c.next.id) == id) {
      const int ring_id = c.next.id, number = operand_of(ring_id);
      if (!holds(index, number)) load(index, number);
      if (first) c.mark(first_input);
      first = false;
      const Shape shape(c, c.control->operands[index][number]);
      with_steps(shape.steps, [&](auto constant) {
        constexpr int kWarpSteps = constant;
#pragma unroll 1
        do multiply<kWarpSteps>(shape);
        while (c.next.id == ring_id);
      });
    }
  }

  PartialWriter partials;

 private:
  // What a lane must know of an operand to multiply its chunks, all that can be known before.
  struct Shape {
    static constexpr int kNone = -1;
    int offset;  // in a stage, of this lane's first values
    int pieces;
    int steps;  // of a piece, this warp's
    // Where this lane's results of a chunk go among the warp's sums, or kNone: of operand row 8 t +
    // g, and rows 2 q and 2 q + 1 of the chunk.
    int sum[Inputs::kTiles][2];
    // In a stage, of the biases of rows 2 q and 2 q + 1, or kNone: the first warp adds them, those
    // of folded rows to the first part.
    int bias[2];

    __device__ __forceinline__ Shape(const Consumer& c, const Operand& operand)
        : offset(c.g * operand.copy.row_pitch +
                 c.warp * operand.iterations * (plan::kStepColumns * 2) + c.q * 16),
          pieces(operand.pieces),
          steps(steps_of(c, operand)) {
      const int fold = operand.slots - 1, slots_log2 = operand.slots >> 1;  // of 1, 2 and 4
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int n = 2 * c.q + column;
#pragma unroll
        for (int t = 0; t < Inputs::kTiles; ++t) {
          const int row = 8 * t + c.g - (operand.first_slot + (n & fold)) * c.p.rows;
          const bool is_valid = row >= 0 && row < c.p.rows;
          sum[t][column] = is_valid ? row * plan::kChunkRows + n : kNone;
        }
        const bool adds = c.warp == 0 && operand.biases != nullptr && (n & fold) == 0;
        bias[column] = adds ? c.p.bias_offset + (n >> slots_log2) * 4 : kNone;
      }
    }
  };
  __device__ __forceinline__ static int steps_of(const Consumer& c, const Operand& operand) {
    return max(0, min(operand.iterations, operand.piece_steps - c.warp * operand.iterations));
  }

  // Calls `run` with the number of steps as a constant, where it is one that Pythia's sizes have.
  // 0 stands for any other.
  template <typename Run>
  __device__ __forceinline__ static void with_steps(int steps, Run&& run) {
    if (steps == 5) return run(std::integral_constant<int, 5>{});
    if (steps == 4) return run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 0>{});
  }

  // ---------------------------------------------------------------- which inputs are held

  static constexpr unsigned kNothing = 0xffffffffu;  // four bits a place: the operand in it
  // Where operands take turns there is a place for each slot, else one for each operand.
  __device__ __forceinline__ int place_of(int index, int operand) const {
    return fits ? operand : c.control->operands[index][operand].first_slot;
  }
  __device__ __forceinline__ bool holds(int index, int operand) const {
    return (held >> 4 * place_of(index, operand) & 15) == static_cast<unsigned>(operand);
  }
  __device__ __forceinline__ void now_holds(int index, int operand) {
    const int shift = 4 * place_of(index, operand);
    held = (held & ~(15u << shift)) | static_cast<unsigned>(operand) << shift;
  }

  // Where this lane's share of operand row `row` lies, from the beginning of a Lamport set, if the
  // row belongs to one of `vectors` from `operand` on, whose slots lie side by side.
  __device__ __forceinline__ int offset_of(int row, const Operand& operand, int vectors) const {
    const int slot = row * c.p.rows_reciprocal >> 16;  // row / p.rows
    const int vector = slot - operand.first_slot;
    if (vector < 0 || vector >= vectors) return Inputs::kNone;
    return operand.source + vector * operand.source_part_bytes +
           (row - slot * c.p.rows) * (plan::kStepColumns * 2);
  }
  template <typename Sources>
  __device__ __forceinline__ Sources sources_of(const Operand& operand, const char* base) const {
    Sources sources;
    sources.base = base + c.warp * operand.iterations * Sources::kStepBytes + c.q * 16;
    sources.pieces = operand.pieces;
    sources.piece_steps = operand.piece_steps;
    sources.steps = steps_of(c, operand);
    return sources;
  }

  // Brings operand `wanted` from its Lamport buffer, and all others of the same vector that fit.
  __device__ __forceinline__ void load(int index, int wanted) {
    const StreamPhase& phase = c.control->phases[index];
    const Operand* operands = c.control->operands[index];
    const int first = !fits ? wanted : wanted < phase.second_product ? 0 : phase.second_product;
    const Operand& operand = operands[first];
    using Sources = typename Inputs::LamportSources;
    auto sources = sources_of<Sources>(operand, lamport_set(c.p, c.epoch));
#pragma unroll
    for (int t = 0; t < Inputs::kTiles; ++t)
      sources.offset[t] = offset_of(8 * t + c.g, operand, fits ? operand.parts * operand.slots : 1);
    // One warp asks whether it is there; all of them together would hold up the weights.
    if (c.p.rows > 1 && comes_late(index, wanted)) {
      if (c.warp == 0) inputs.await_first(sources);
      c.barrier();
    }
    inputs.await(sources);
    for (int number = first; number < first + (fits ? operand.parts : 1); ++number)
      now_holds(index, number);
  }

  // Whether this block may have to wait for operand `wanted`: not for the second of the normalised
  // vectors, nor behind its attention for the MLP's activations.
  __device__ __forceinline__ bool comes_late(int index, int wanted) const {
    const StreamPhase& phase = c.control->phases[index];
    if (phase.normalizes) return wanted == 0;
    const bool is_mlp = c.control->operands[index][wanted].stream == Stream::mlp_down;
    return !(is_mlp && phase.attention_before && c.control->num_tasks > 0);
  }

  // Where the residual stream is kept in every block, the normalised inputs lie in scratch, which
  // partial sums will overwrite: vector after vector, one row of each.
  __device__ __forceinline__ void load_normalised(int index) {
    const int count = c.control->phases[index].operands;
    using Sources = typename Inputs::template Sources<1>;
    auto sources = sources_of<Sources>(c.control->operands[index][0], c.scratch);
#pragma unroll
    for (int t = 0; t < Inputs::kTiles; ++t) {
      const int row = 8 * t + c.g;
      sources.offset[t] = row < count ? row * c.p.hidden_size * 2 : Inputs::kNone;
    }
    inputs.load(sources, [](uint4& to, const char* from, bool is_there) {
      if (is_there) to = *reinterpret_cast<const uint4*>(from);
    });
    for (int number = 0; number < count; ++number) now_holds(index, number);
    c.barrier();
  }

  // ---------------------------------------------------------------- multiplying

  // Steps whose weights are under way together, as far as there are registers.
  static constexpr int kBatch = kOperandRows * kPieces > 32 ? 2 : Inputs::kSteps;

  // Of a chunk: of the products with a weight's first two words, of which rows 0 to 7 are used,
  // and of those with its last two, of which rows 8 to 15 are.
  struct Sums {
    float value[Inputs::kTiles][2][4] = {};
  };

  // The chunk that comes next, of which this warp has kWarpSteps steps of each piece, or
  // shape.steps if that is 0.
  template <int kWarpSteps>
  __device__ __forceinline__ void multiply(const Shape& shape) {
    constexpr int kSteps = kWarpSteps > 0 ? kWarpSteps : Inputs::kSteps;
    Sums sums;
    const RingAnnouncement chunk = c.next;
    float2 bias = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= shape.pieces) break;
      c.ring.wait_landed();
      const std::uint32_t data = c.ring.data();
#pragma unroll
      for (int first = 0; first < kSteps; first += kBatch) {
        uint4 weight[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch && first + i < kSteps; ++i) {
          const std::uint32_t address =
              data + shape.offset + (first + i) * (plan::kStepColumns * 2);
          weight[i] = make_uint4(0, 0, 0, 0);
          if (kWarpSteps > 0 || first + i < shape.steps) weight[i] = load_shared_4(address);
        }
        if (first + kBatch >= kSteps) {
          if (piece + 1 == shape.pieces)
            bias = make_float2(load_bias(data, shape.bias[0], chunk.label.second),
                               load_bias(data, shape.bias[1], chunk.label.second));
          c.ring.release(c.lane);
        }
#pragma unroll
        for (int i = 0; i < kBatch && first + i < kSteps; ++i)
#pragma unroll
          for (int t = 0; t < Inputs::kTiles; ++t) {
            const uint4& operand = inputs.operand[t][piece][first + i];
            mma_16x8x16<T>(sums.value[t][0], operand, weight[i].x, weight[i].y);
            mma_16x8x16<T>(sums.value[t][1], operand, weight[i].z, weight[i].w);
          }
      }
    }
    store(shape, sums, bias, chunk);
    c.await_announcement();
  }

  __device__ __forceinline__ static float load_bias(std::uint32_t data, int offset, int label) {
    return load_shared_if(data + offset + (label >> 1), offset != Shape::kNone, 0.0f);
  }

  // Gives the reducers this warp's sums of the chunk.
  __device__ __forceinline__ void store(const Shape& shape, const Sums& sums, const float2& bias,
                                        const RingAnnouncement& chunk) {
    float* to = partials.begin(c.warp, c.p.rows);
#pragma unroll
    for (int t = 0; t < Inputs::kTiles; ++t) {
      const int(&place)[2] = shape.sum[t];
      const float* first = sums.value[t][0];
      const float* second = sums.value[t][1] + 2;
      if (place[0] != Shape::kNone) to[place[0]] = first[0] + second[0] + bias.x;
      if (place[1] != Shape::kNone) to[place[1]] = first[1] + second[1] + bias.y;
    }
    partials.end(c.warp, c.lane, chunk.id, chunk.label.first);
  }

  Consumer& c;
  Inputs inputs;
  bool fits = false;  // all of the phase's
  unsigned held = kNothing;
};

}  // namespace clusterfusion::cuda::stream
