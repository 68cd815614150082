// A matrix times activations: the chunks of a stream as they land, then the sums of their rows.
#pragma once

#include "backend/cuda/decode/units.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeProduct : public DecodeUnits<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeUnits<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::consumer_barrier, Base::control, Base::discard_prefetched, Base::epoch, Base::g,
      Base::has_two_stages, Base::kTwoStages, Base::kMaxPrefetched, Base::kPackedOperands,
      Base::lane, Base::load_iteration, Base::make_indices_opaque, Base::next_id, Base::p,
      Base::prefetched, Base::ring, Base::sums, Base::thread;
  using typename Base::Frag;
  using typename Base::MmaMapping;
  using typename Base::PackedProducts;
  using typename Base::Products;
  using typename Base::UnitCursor;

  // Multiplies the chunks of stage id `id` that come next, until there are `max_slots`, of which
  // `slot` are there; returns how many there are then. With as few instructions as can be, because
  // each takes time. (These four loops have no common frame: where it calls a body, ptxas keeps an
  // announcement on the stack.)
  __device__ __forceinline__ int multiply_chunks(UnitCursor& cursor, int id, int slot,
                                                 int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    do {
      ring.wait_landed();
      cursor.multiply_chunk(cursor.chunk(next), fragments);
      ring.release(lane);
      next = ring.announcement();
      ++slot;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // The same with packed operands, where a warp has one unit of a chunk.
  template <int kIterations>
  __device__ __forceinline__ int multiply_packed(UnitCursor& cursor, int id, int slot,
                                                 int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    const std::uint32_t bias_offset =
        cursor.bias_offset + cursor.unit_index * cursor.unit_bias_bytes;
    do {
      const typename UnitCursor::Chunk chunk = cursor.chunk(next);
      ring.wait_landed();
      uint4 weight[kIterations];
#pragma unroll
      for (int i = 0; i < kIterations; ++i)
        weight[i] = load_iteration(chunk.data + cursor.offset, cursor.swap, i);
      const float bias = load_shared_if(chunk.biases + bias_offset, cursor.holds_bias, Bias{});
      ring.release(lane);
      PackedProducts products;
#pragma unroll
      for (int i = 0; i < kIterations; ++i) products.add(i, weight[i], fragments.value[i]);
      next = ring.announcement();
      const float value = products.diagonal() + bias;
      if (cursor.holds_sum != 0) store_shared(cursor.sum_address, value);
      cursor.sum_address += cursor.sum_step;
      ++slot;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // The same with packed pairs: lanes of g < 4 have the first of two chunks, the others the second.
  // Where there is no second one, the other lanes' sums are not stored.
  template <int kIterations>
  __device__ __forceinline__ int multiply_packed_pairs(UnitCursor& cursor, int id, int slot,
                                                       int max_slots, const Frag& fragments) {
    if (next_id != id) return slot;
    RingAnnouncement next = ring.announcement();
    do {
      const RingAnnouncement behind = ring.next_announcement();
      const bool two = behind.id == id && slot + 1 < max_slots;
      ring.wait_landed();
      if (two) ring.wait_next_landed();
      const typename UnitCursor::Chunk chunk = cursor.chunk(two && g >= 4 ? behind : next);
      uint4 weight[kIterations];
#pragma unroll
      for (int i = 0; i < kIterations; ++i)
        weight[i] = load_iteration(chunk.data + cursor.offset, cursor.swap, i);
      const float bias =
          load_shared_if(chunk.biases + cursor.bias_offset, cursor.holds_bias, Bias{});
      ring.release(lane, two);
      PackedProducts products;
#pragma unroll
      for (int i = 0; i < kIterations; ++i) products.add_pair(i, weight[i], fragments);
      next = ring.announcement();
      const float value = products.diagonal() + bias;
      if (cursor.holds_sum != 0 && (two || g < 4)) store_shared(cursor.sum_address, value);
      cursor.sum_address += cursor.sum_step * (two ? 2 : 1);
      slot += two ? 2 : 1;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }

  // With a number of iterations that plan::with_packed_operands() gives.
  __device__ __forceinline__ int multiply_packed(UnitCursor& cursor, int id, int slot,
                                                 int max_slots, const Frag& fragments) {
    if constexpr (kMaxIterations > plan::kNarrowFragments) {
      if constexpr (kMaxIterations >= 10)
        if (cursor.iterations == 10)
          return multiply_packed<10>(cursor, id, slot, max_slots, fragments);
      switch (cursor.iterations) {
        case 8: return multiply_packed<8>(cursor, id, slot, max_slots, fragments);
        case 6: return multiply_packed<6>(cursor, id, slot, max_slots, fragments);
        default: return multiply_packed<4>(cursor, id, slot, max_slots, fragments);
      }
    } else {
      return cursor.iterations == 5 ? multiply_packed<5>(cursor, id, slot, max_slots, fragments)
                                    : multiply_packed<4>(cursor, id, slot, max_slots, fragments);
    }
  }
  __device__ __forceinline__ int multiply_packed_pairs(UnitCursor& cursor, int id, int slot,
                                                       int max_slots, const Frag& fragments) {
    return cursor.iterations == 10
               ? multiply_packed_pairs<10>(cursor, id, slot, max_slots, fragments)
               : multiply_packed_pairs<8>(cursor, id, slot, max_slots, fragments);
  }

  // The same where a chunk is one row in two stages: lanes of g < 4 have the first, the others the
  // second.
  template <int kIterations>
  __device__ __forceinline__ int multiply_in_two_stages(UnitCursor& cursor, int first_stage_bytes,
                                                        int id, int slot, int max_slots,
                                                        const Frag& fragments) {
    if (next_id != id) return slot;
    const int offset = cursor.offset - (g < 4 ? 0 : first_stage_bytes);
    RingAnnouncement next = ring.announcement();
    do {
      const RingAnnouncement behind = ring.next_announcement();
      ring.wait_landed();
      ring.wait_next_landed();
      const std::uint32_t data = (g < 4 ? next.data : behind.data) + offset;
      // At most eight at once: registers.
      constexpr int kFirst = kIterations > 8 ? kIterations - 8 : 0;
      Products products;
      const auto load = [&](int i) {
        return i < cursor.iterations ? load_iteration(data, cursor.swap, i)
                                     : make_uint4(0, 0, 0, 0);
      };
#pragma unroll
      for (int i = 0; i < kFirst; ++i) products.add(i, load(i), fragments.value[i]);
      uint4 weight[kIterations - kFirst];
#pragma unroll
      for (int i = kFirst; i < kIterations; ++i) weight[i - kFirst] = load(i);
      const float bias = load_shared_if(cursor.chunk(next).biases, cursor.holds_bias, Bias{});
      ring.release(lane, true);
#pragma unroll
      for (int i = kFirst; i < kIterations; ++i)
        products.add(i, weight[i - kFirst], fragments.value[i]);
      next = ring.announcement();
      const float value = products.diagonal() + bias;
      if (cursor.holds_sum != 0) store_shared(cursor.sum_address, value);
      cursor.sum_address += cursor.sum_step;
      ++slot;
    } while (next.id == id && slot < max_slots);
    next_id = next.id;
    return slot;
  }
  __device__ __forceinline__ int multiply_in_two_stages(UnitCursor& cursor,
                                                        const StreamedMatrix& matrix, int id,
                                                        int slot, const Frag& fragments) {
    const auto multiply = [&](auto constant) {
      constexpr int kIterations = constant;
      return multiply_in_two_stages<kIterations>(cursor, matrix.first_stage_bytes, id, slot,
                                                 matrix.max_slots, fragments);
    };
    if constexpr (kTwoStages) {
      if (matrix.iterations <= 6) return multiply(std::integral_constant<int, 6>{});
      if (matrix.iterations == 7) return multiply(std::integral_constant<int, 7>{});
      if (kMaxIterations > 8 && matrix.iterations == 8)
        return multiply(std::integral_constant<int, 8>{});
    }
    return multiply(std::integral_constant<int, kMaxIterations>{});
  }

  // Multiplies all chunks of `stream` that come next, and hands each row's number and sum, bias
  // included, to `epilogue`; of a gated MLP's first matrices the gate's sum and the other's.
  // `before_epilogue` is called when the last chunk is multiplied, before rows are reduced: the
  // place to issue loads of what comes next.
  template <typename Epilogue, typename BeforeEpilogue>
  __device__ __forceinline__ void multiply(Stream stream, const StreamedMatrix& matrix,
                                           const Frag& fragments, Epilogue&& epilogue,
                                           BeforeEpilogue&& before_epilogue) {
    make_indices_opaque();
    const int max_slots = matrix.max_slots;
    const int id = ring_id(epoch, stream);
    if constexpr (kKind == plan::LayerKind::any)
      if (thread == 0) block_counter_store(&control->multiplies, 1);
    UnitCursor cursor(*this, matrix, control->has_bias[static_cast<int>(stream)]);
    int slot = 0;
    if (kMaxPrefetched > 0 && prefetched.chunks > 0) {
      cursor.multiply(prefetched, fragments);
      slot = prefetched.chunks;
      next_id = ring.announcement().id;
    }
    discard_prefetched();
#pragma unroll 1
    while (true) {
      if (kPackedOperands && cursor.mapping == MmaMapping::packed)
        slot = multiply_packed(cursor, id, slot, max_slots, fragments);
      else if (kPackedOperands && cursor.mapping == MmaMapping::packed_pairs)
        slot = multiply_packed_pairs(cursor, id, slot, max_slots, fragments);
      else if (has_two_stages(matrix))
        slot = multiply_in_two_stages(cursor, matrix, id, slot, fragments);
      else
        slot = multiply_chunks(cursor, id, slot, max_slots, fragments);
      const bool over = next_id != id;
      if constexpr (kKind == plan::LayerKind::any) {
        // One copy of the code that finishes rows, which is longer here.
        if (over) {
          if (thread == 0) block_counter_store(&control->multiplies, 0);
          before_epilogue();
        }
        if (slot > 0) reduce_any_rows(stream, matrix, slot, epilogue);
      }
      if (over) break;
      if constexpr (kKind == plan::LayerKind::plain) reduce_rows(matrix, slot, epilogue);
      cursor.sum_address -= slot * matrix.sums_per_chunk * 4;
      slot = 0;
    }
    if constexpr (kKind == plan::LayerKind::plain) {
      before_epilogue();
      if (slot > 0) reduce_rows(matrix, slot, epilogue);
    }
  }
  template <typename Epilogue>
  __device__ __forceinline__ void multiply(Stream stream, const StreamedMatrix& matrix,
                                           const Frag& fragments, Epilogue&& epilogue) {
    multiply(stream, matrix, fragments, epilogue, [] {});
  }

  // This lane's share of a row's sums, which lies at `own`.
  __device__ __forceinline__ static float lane_sum(const StreamedMatrix& matrix, const float* own) {
    float value = 0.0f;
    if (matrix.lane_sums_log2 >= 2) {
      const float4 low = *reinterpret_cast<const float4*>(own);
      value = (low.x + low.y) + (low.z + low.w);
      if (matrix.lane_sums_log2 == 3) {
        const float4 high = *reinterpret_cast<const float4*>(own + 4);
        value += (high.x + high.y) + (high.z + high.w);
      }
    } else {
      for (int sum = 0; sum < 1 << matrix.lane_sums_log2; ++sum) value += own[sum];
    }
    return value;
  }
  // The whole sum of a row, from the shares of its lanes.
  __device__ __forceinline__ static float row_sum(const StreamedMatrix& matrix, float value) {
    for (int distance = 1; distance < 1 << matrix.row_lanes_log2; distance *= 2)
      value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
  }

  // Adds up the sums of each row, by some lanes each.
  template <typename Epilogue>
  __device__ __forceinline__ void reduce_rows(const StreamedMatrix& matrix, int slots,
                                              Epilogue&& epilogue) {
    consumer_barrier();
    const unsigned before = control->finished_chunks;
    const int count = slots * matrix.rows_per_chunk;
    const int rows_at_once = kConsumerThreads >> matrix.row_lanes_log2;
    for (int first = 0; first < count; first += rows_at_once) {
      const int i = first + (thread >> matrix.row_lanes_log2);
      const float* own =
          sums + (((first << matrix.row_lanes_log2) + thread) << matrix.lane_sums_log2);
      const float value = row_sum(matrix, i < count ? lane_sum(matrix, own) : 0.0f);
      if (i >= count || (thread & ((1 << matrix.row_lanes_log2) - 1)) != 0) continue;
      const int slot = matrix.slot_of(i);
      const int chunk = control->chunks[(before + slot) % kKnownChunks];
      const int row = (chunk - slot) * matrix.rows_per_chunk + i;
      if (row < matrix.rows) epilogue(row, value);
    }
    consumer_barrier();
    if (thread == 0) control->finished_chunks = before + slots;
  }

  // The same of layers of any kind: one copy of the code, since what a layer runs through has to
  // fit into the instruction cache. A chunk of a gated MLP's first matrices is rows of its gate and
  // behind them the same rows of the other: the epilogue gets both sums of a row.
  template <typename Epilogue>
  __device__ __forceinline__ void reduce_any_rows(Stream stream, const StreamedMatrix& matrix,
                                                  int slots, Epilogue&& epilogue) {
    consumer_barrier();
    const unsigned before = control->finished_chunks;
    const int gated = stream == Stream::mlp_up && p.first_layer.mlp_gate != nullptr ? 1 : 0;
    const int in_chunk = matrix.rows_per_chunk >> gated;
    const int count = slots * in_chunk;
    const int rows_at_once = kConsumerThreads >> matrix.row_lanes_log2;
    const int row_lane = thread & ((1 << matrix.row_lanes_log2) - 1);
#pragma unroll 1
    for (int first = 0; first < count; first += rows_at_once) {
      const int i = first + (thread >> matrix.row_lanes_log2);
      const int slot = matrix.slot_of(i << gated);
      const int in_slot = i - slot * in_chunk;
      int share = ((slot * matrix.rows_per_chunk + in_slot) << matrix.row_lanes_log2) + row_lane;
      float value = 0.0f, beside_gate = 1.0f;
#pragma unroll 1
      for (int part = 0; part <= gated; ++part) {
        const float sum = row_sum(
            matrix, i < count ? lane_sum(matrix, sums + (share << matrix.lane_sums_log2)) : 0.0f);
        (part == 0 ? value : beside_gate) = sum;
        share += in_chunk << matrix.row_lanes_log2;
      }
      if (i >= count || row_lane != 0) continue;
      const int chunk = control->chunks[(before + slot) % kKnownChunks];
      const int row = chunk * in_chunk + in_slot;
      if (row < matrix.rows >> gated) epilogue(row, value, beside_gate);
    }
    consumer_barrier();
    if (thread == 0) control->finished_chunks = before + slots;
  }
};

}  // namespace clusterfusion::cuda
