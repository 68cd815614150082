// Units: what a consumer warp multiplies at a time, on the tensor cores. The cursor that iterates
// over a warp's units, and the prefetch registers that take them from the ring early.
#pragma once

#include "backend/cuda/decode/consumer.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "backend/cuda/ptx/shared_memory.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeUnits : public DecodeConsumer<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeConsumer<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::control, Base::g, Base::kBatch, Base::kFewRegisters, Base::kMaxPrefetched,
      Base::kPackedOperands, Base::kPairs, Base::kPrefetchLoads, Base::lane,
      Base::make_indices_opaque, Base::next_id, Base::prefetched, Base::ring;
  using typename Base::Frag;
  using typename Base::MmaMapping;
  using typename Base::PrefetchRegisters;

  // Only wide kernels need code for rows in two stages.
  static constexpr bool kTwoStages =
      kKind == plan::LayerKind::any && kMaxIterations > plan::kNarrowFragments;
  __device__ __forceinline__ static bool has_two_stages(const StreamedMatrix& matrix) {
    return kTwoStages && matrix.first_stage_bytes > 0;
  }

  // What dot() multiplies, in shared memory.
  struct Unit {
    std::uint32_t values;  // of this lane
    std::uint32_t bias;    // of its row
    int holds_bias;        // whether it is this lane that adds it

    __device__ __forceinline__ float load_bias() const {
      return load_shared_if(bias, holds_bias, Bias{});
    }
  };

  // This lane's share of a unit; lanes q = g / 2 get slice g % slices of row g / slices. The four
  // words of a lane's 16 bytes of weights are operand A as they stand: words 0 and 2 in row g,
  // words 1 and 3 in row g + 8. So the activations, operand B, are words 0 and 2 for a first
  // product, of which rows 0 to 7 are used, and words 1 and 3 for a second, of which rows 8 to 15;
  // they lie in this order in memory (operand_order). In both the diagonal is the result: row g
  // (+ 8), column g.
  template <int kIterations>
  __device__ __forceinline__ static float dot(const Unit& unit, std::uint32_t swap, int iterations,
                                              const Frag& fragments) {
    Products products;
    const float bias = unit.load_bias();
#pragma unroll
    for (int first = 0; first < (kIterations > 0 ? kIterations : kMaxIterations); first += kBatch) {
      if (kIterations == 0 && first > 0 && !some_lane_has(first, iterations)) break;
      uint4 weight[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        weight[i] = make_uint4(0, 0, 0, 0);
        if (first + i < (kIterations > 0 ? kIterations : iterations))
          weight[i] = load_iteration(unit.values, swap, first + i);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (kIterations == 0 || first + i < kIterations)
          products.add(i, weight[i], fragments.value[first + i]);
    }
    return products.diagonal() + bias;
  }

  // Whether iteration i is there in some lane, where each has `iterations`.
  __device__ __forceinline__ static bool some_lane_has(int i, int iterations) {
    if constexpr (kKind == plan::LayerKind::plain) return i < iterations;
    return __any_sync(kAllLanes, i < iterations);
  }

  // Iteration i of a unit whose values begin at `address`.
  __device__ __forceinline__ static uint4 load_iteration(std::uint32_t address, std::uint32_t swap,
                                                         int i) {
    return load_shared_4((i % 2 == 0 ? address + swap : address - swap) + i * 64);
  }

  // In independent chains, to hide the latency of a product.
  struct Products {
    float even[2][4] = {}, odd[2][4] = {};
    __device__ __forceinline__ void add(int i, const uint4& weight, const uint4& activation) {
      mma_16x8x16<T>(even[i % 2], weight, activation.x, activation.y);
      mma_16x8x16<T>(odd[i % 2], weight, activation.z, activation.w);
    }
    __device__ __forceinline__ float diagonal() const {
      const bool odd_column = threadIdx.x & 4;  // g is odd
      return odd_column ? (even[0][1] + even[1][1]) + (odd[0][3] + odd[1][3])
                        : (even[0][0] + even[1][0]) + (odd[0][2] + odd[1][2]);
    }
  };

  // With packed operands: the first half of slice s in column 2 s of operand B, the second in
  // column 2 s + 1. Rows 0 to 7 have the first half of a slice's weights, rows 8
  // to 15 the second, so one product is all it takes; lanes q get slice q = g % slices of row g /
  // slices.
  struct PackedProducts {
    float result[2][4] = {};
    __device__ __forceinline__ void add(int i, const uint4& weight, const uint4& activation) {
      mma_16x8x16<T>(result[i % 2], weight, activation.x, activation.y);
    }
    // Iteration i, where a fragment has two.
    __device__ __forceinline__ void add_pair(int i, const uint4& weight, const Frag& fragments) {
      const uint4& activation = fragments.value[i / 2];
      if (i % 2 == 0)
        mma_16x8x16<T>(result[0], weight, activation.x, activation.y);
      else
        mma_16x8x16<T>(result[1], weight, activation.z, activation.w);
    }
    __device__ __forceinline__ float diagonal() const {
      return (result[0][0] + result[1][0]) + (result[0][3] + result[1][3]);
    }
  };

  // The same for two units at once, with the same sums in the same order.
  template <int kIterations>
  __device__ __forceinline__ static float2 dot_2(const Unit& first, const Unit& second,
                                                 std::uint32_t swap, int iterations,
                                                 const Frag& fragments) {
    constexpr int kLoads = kIterations > 0 ? kIterations : kBatch;
    uint4 weight[2][kLoads];
    const float2 bias = make_float2(first.load_bias(), second.load_bias());
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        weight[unit][i] = make_uint4(0, 0, 0, 0);
        if (kIterations > 0 || i < iterations)
          weight[unit][i] = load_iteration(unit == 0 ? first.values : second.values, swap, i);
      }
    Products products[2];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int unit = 0; unit < 2; ++unit)
        products[unit].add(i, weight[unit][i], fragments.value[i]);
    return make_float2(products[0].diagonal() + bias.x, products[1].diagonal() + bias.y);
  }

  // Iterates over a warp's units of its segment, chunk after chunk. All state is in registers and
  // advances by increments: between two chunks there is no time to compute addresses.
  struct UnitCursor {
    int unit_index;             // the next unit of this warp in the current chunk
    int offset;                 // in the chunk, of this lane's first values of that unit
    std::uint32_t sum_address;  // where this lane's sum of that unit goes
    int bias_offset;            // in the chunk's biases, of this lane's row of unit 0
    int unit_bias_bytes;
    // From one unit of this warp to the next.
    int unit_step, offset_step, sum_step;
    int chunk_units, chunk_bytes;
    int iterations;  // of this lane; with packed operands the same in all
    std::uint32_t swap;
    int holds_sum, holds_bias;  // the lane with the first of a row's sums adds the bias to it
    MmaMapping mapping;

    __device__ __forceinline__ UnitCursor(const DecodeUnits& step, const StreamedMatrix& matrix,
                                          bool has_bias) {
      mapping = kPackedOperands ? matrix.mapping : MmaMapping::two_pass;
      const int row_in_unit = step.g >> matrix.slices_log2;
      const int row_in_chunk = mapping == MmaMapping::packed_pairs ? 0 : row_in_unit;
      const int segment = step.warp & (matrix.segments - 1);
      const int slice = step.g & ((1 << matrix.slices_log2) - 1);
      // Each (row, segment, slice) has a sum.
      const int row_sums_log2 = matrix.segments_log2 + matrix.slices_log2;
      const int unit_bytes = matrix.unit_rows * matrix.row_bytes;
      const int unit_sums = matrix.unit_rows << row_sums_log2;
      unit_index = step.warp >> matrix.segments_log2;
      offset =
          unit_index * unit_bytes + row_in_chunk * matrix.row_bytes + step.lane_column(matrix) * 2;
      const int sum = unit_index * unit_sums + (row_in_unit << row_sums_log2) +
                      (segment << matrix.slices_log2) + slice;
      sum_address = shared_address(step.sums + sum);
      const int zero = step.opaque_zero();
      unit_step = (plan::kConsumerWarps >> matrix.segments_log2) + zero;
      offset_step = unit_step * unit_bytes;
      sum_step = unit_step * unit_sums * 4;
      chunk_units = matrix.units_per_chunk + zero;
      chunk_bytes = chunk_units * unit_bytes;
      iterations = step.lane_iterations(matrix, step.lane_column(matrix)) + zero;
      swap = step.swap_columns(matrix) * 2;
      holds_sum = step.q == (mapping == MmaMapping::two_pass ? step.g / 2 : slice);
      holds_bias = holds_sum && has_bias && segment == 0 && slice == 0;
      bias_offset = row_in_chunk * static_cast<int>(sizeof(Bias));
      unit_bias_bytes = matrix.unit_rows * static_cast<int>(sizeof(Bias));
    }

    // A chunk in shared memory.
    struct Chunk {
      std::uint32_t data;
      std::uint32_t biases;
    };
    __device__ __forceinline__ static Chunk chunk(const RingAnnouncement& announcement) {
      return {announcement.data, static_cast<std::uint32_t>(announcement.label.first)};
    }

    // This warp's units of a chunk, two at a time.
    __device__ __forceinline__ void multiply_chunk(Chunk chunk, const Frag& fragments) {
      const std::uint32_t bias = chunk.biases + bias_offset;
      const auto unit_at = [&](int index, int offset) -> Unit {
        return {chunk.data + offset, bias + index * unit_bias_bytes, holds_bias};
      };
      with_iterations(iterations, [&](auto constant) {
        constexpr int kIterations = constant;
        if constexpr (kPairs) {
#pragma unroll 1
          while (unit_index + unit_step < chunk_units) {
            const float2 values = dot_2<kIterations>(
                unit_at(unit_index, offset), unit_at(unit_index + unit_step, offset + offset_step),
                swap, iterations, fragments);
            if (holds_sum != 0) {
              store_shared(sum_address, values.x);
              store_shared(sum_address + sum_step, values.y);
            }
            advance(2);
          }
        }
#pragma unroll 1
        while (unit_index < chunk_units) {
          const float value =
              dot<kIterations>(unit_at(unit_index, offset), swap, iterations, fragments);
          if (holds_sum != 0) store_shared(sum_address, value);
          advance(1);
        }
      });
      unit_index -= chunk_units;
      offset -= chunk_bytes;
    }
    // Loads this warp's only unit of a chunk.
    __device__ __forceinline__ void load(Chunk chunk, uint4 (&weight)[kPrefetchLoads],
                                         float& of_row) const {
      of_row = load_shared_if(chunk.biases + bias_offset + unit_index * unit_bias_bytes, holds_bias,
                              Bias{});
#pragma unroll
      for (int i = 0; i < kPrefetchLoads; ++i) {
        weight[i] = make_uint4(0, 0, 0, 0);
        if (i < iterations) weight[i] = load_iteration(chunk.data + offset, swap, i);
      }
    }
    // The same of this warp's unit of two stages; `data`: where the row lies that this lane has a
    // part of.
    __device__ __forceinline__ void load_pair(std::uint32_t data, std::uint32_t biases,
                                              PrefetchRegisters& prefetched) const {
      prefetched.bias[0] = load_shared_if(biases + bias_offset, holds_bias, Bias{});
#pragma unroll
      for (int i = 0; i < 2 * kPrefetchLoads; ++i) {
        uint4& weight = prefetched.weight[i / kPrefetchLoads][i % kPrefetchLoads];
        weight = make_uint4(0, 0, 0, 0);
        if (i < iterations) weight = load_iteration(data + offset, swap, i);
      }
    }
    // Multiplies what load() or load_pair() has loaded.
    __device__ __forceinline__ void multiply(const PrefetchRegisters& prefetched,
                                             const Frag& fragments) {
      const auto weight_at = [&](int i) {
        return prefetched.weight[i / kPrefetchLoads][i % kPrefetchLoads];
      };
      if (mapping == MmaMapping::packed_pairs) {
        PackedProducts products;
#pragma unroll
        for (int i = 0; i < 2 * kPrefetchLoads; ++i) products.add_pair(i, weight_at(i), fragments);
        if (holds_sum != 0) store_shared(sum_address, products.diagonal() + prefetched.bias[0]);
      } else if (kTwoStages && mapping == MmaMapping::two_pass) {
        Products products;
#pragma unroll
        for (int i = 0; i < (kTwoStages ? 2 * kPrefetchLoads : 0); ++i)
          products.add(i, weight_at(i), fragments.value[i]);
        if (holds_sum != 0) store_shared(sum_address, products.diagonal() + prefetched.bias[0]);
      } else {
        PackedProducts products[kMaxPrefetched > 0 ? kMaxPrefetched : 1];
#pragma unroll
        for (int i = 0; i < kPrefetchLoads; ++i)
#pragma unroll
          for (int which = 0; which < kMaxPrefetched; ++which)
            products[which].add(i, prefetched.weight[which][i], fragments.value[i]);
#pragma unroll
        for (int which = 0; which < kMaxPrefetched; ++which)
          if (holds_sum != 0 && which < prefetched.chunks)
            store_shared(sum_address + which * sum_step,
                         products[which].diagonal() + prefetched.bias[which]);
      }
      sum_address += prefetched.chunks * sum_step;
    }

    // Calls `run` with the number of iterations as a constant, where it is one that Pythia's sizes
    // have: loads that need no predicate are issued one behind the other. 0 stands for any other.
    template <typename Run>
    __device__ __forceinline__ static void with_iterations(int iterations, Run&& run) {
      if constexpr (kPairs && !kPackedOperands && !kFewRegisters &&
                    kKind == plan::LayerKind::plain) {
        if (iterations == 5) return run(std::integral_constant<int, 5>{});
        if (iterations == 4) return run(std::integral_constant<int, 4>{});
      }
      run(std::integral_constant<int, 0>{});
    }
    __device__ __forceinline__ void advance(int units) {
      unit_index += units * unit_step;
      offset += units * offset_step;
      sum_address += units * sum_step;
    }
  };

  // Moves the next chunks from the ring to prefetch registers, if they have landed and are not
  // attention's; `next_id` stays theirs. For whole warps.
  __device__ __forceinline__ void prefetch_chunks() {
    if constexpr (kMaxPrefetched > 0) {
      if (prefetched.chunks == kMaxPrefetched || next_id == kRingEnd) return;
      const int stream = stream_of(next_id);
      if (stream == static_cast<int>(Stream::attention)) return;
      if (!ring.peek().holds(next_id)) return;
      make_indices_opaque();
      const StreamedMatrix& matrix = control->matrices[stream];
      const bool two_stages = has_two_stages(matrix);
      const bool in_pairs = matrix.mapping == MmaMapping::packed_pairs;
      if (matrix.mapping == MmaMapping::two_pass && !two_stages) return;
      if (!kPairs && matrix.iterations > (two_stages || in_pairs ? 2 : 1) * kPrefetchLoads) return;
      const UnitCursor cursor(*this, matrix, control->has_bias[stream]);
      if (in_pairs || two_stages) {
        const RingPeek first = ring.peek(), second = ring.peek_next();
        if (prefetched.chunks > 0 || matrix.max_slots < 3 || !second.holds(next_id)) return;
        const bool is_first = g < 4;
        const std::uint32_t data = is_first   ? first.what.data
                                   : in_pairs ? second.what.data
                                              : second.what.data - matrix.first_stage_bytes;
        const int biases = is_first ? first.what.label.first : second.what.label.first;
        cursor.load_pair(data, static_cast<std::uint32_t>(biases), prefetched);
        ring.release(lane, true);
        prefetched.chunks = in_pairs ? 2 : 1;
        return;
      }
#pragma unroll
      for (int i = 0; i < kMaxPrefetched; ++i) {
        if (i != prefetched.chunks || i + 1 >= matrix.max_slots) continue;
        const RingPeek chunk = ring.peek();
        if (!chunk.holds(next_id)) return;
        cursor.load(cursor.chunk(chunk.what), prefetched.weight[i], prefetched.bias[i]);
        ring.release(lane);
        ++prefetched.chunks;
      }
    }
  }
};

}  // namespace clusterfusion::cuda
