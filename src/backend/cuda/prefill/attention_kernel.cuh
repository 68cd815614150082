// Causal attention over KV pages with tensor cores: each warp owns rows of queries and walks over
// tiles of keys with an online softmax (Dao, FlashAttention-2, arXiv:2307.08691).
//
// The result of a row depends on its own query and on the keys up to its position, in one fixed
// order: neither on what else is computed, nor on where the pages lie.
#pragma once

#include <cmath>

#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/prefill/attention.hpp"
#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "backend/cuda/ptx/mma.cuh"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

using namespace device;

// Sizes of an instance for head sizes up to 16 x kHeadSteps.
template <int kHeadSteps>
struct AttentionShape {
  static constexpr int kWarps = kAttentionThreads / 32;
  // Tiles of 16 query rows for each warp: with two, a fragment of keys or values read from shared
  // memory serves two products. The largest heads have no registers for that.
  static constexpr int kRowTiles = kHeadSteps <= 8 ? 2 : 1;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr int kKeys = kHeadSteps <= 5 ? 64 : 32;
  static constexpr int kKeyTiles = kKeys / 8;
  // Rows in shared memory: 16-byte units, swizzled or padded so that eight rows of one column of
  // units lie in different banks.
  static constexpr int kUnits = 2 * kHeadSteps;
  static constexpr bool kSwizzled = kUnits % 8 == 0;
  static constexpr int kRowBytes = kUnits * 16 + (kSwizzled ? 0 : 16);
  static_assert(kSwizzled || kRowBytes / 16 % 2 == 1);

  static constexpr int kTileBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys and values
  // Shared memory: two stages, then queries.
  static constexpr int kQueryOffset = 2 * kStageBytes;
  static constexpr int kSharedBytes = kQueryOffset + kRows * kRowBytes;
  static_assert(kSharedBytes <= 99 * 1024, "compute capability 8.6, 8.9 and 12.0 have no more");
};

template <typename T, int kHeadSteps>
class AttentionTile {
 public:
  using Shape = AttentionShape<kHeadSteps>;
  static constexpr int kRowTiles = Shape::kRowTiles;

  __device__ __forceinline__ AttentionTile(const AttentionParams& params, char* shared)
      : p(params),
        tile(params.tiles[blockIdx.y]),
        base(shared_address(shared)),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        q(threadIdx.x % 4),
        head(blockIdx.x),
        kv_head(blockIdx.x / params.heads_per_kv_head),
        warp_row(threadIdx.x / 32 * 16 * kRowTiles),
        end_position(tile.position + tile.count) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) maximum[r][0] = maximum[r][1] = -INFINITY;
  }

  __device__ __forceinline__ void run() {
    wait_for_dependencies();
    if (tile.count == 0) return;
    load_query();
    load_keys_and_values(0);
    const int steps = (end_position + Shape::kKeys - 1) / Shape::kKeys;
    const int warp_end = tile.position + warp_row + 16 * kRowTiles;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies();
      // These keys have landed for everybody, and everybody is done with those before.
      __syncthreads();
      if (step + 1 < steps) load_keys_and_values(step + 1);
      if (step * Shape::kKeys < warp_end && warp_row < tile.count) attend(step);
    }
    store();
  }

 private:
  __device__ __forceinline__ static std::uint32_t unit_offset(int row, int unit) {
    return row * Shape::kRowBytes + (Shape::kSwizzled ? unit ^ (row & 7) : unit) * 16;
  }

  // This head of a row of queries or outputs.
  __device__ __forceinline__ char* head_of(void* rows, int row) const {
    const std::int64_t element =
        (static_cast<std::int64_t>(tile.row + row) * p.num_heads + head) * p.head_dim;
    return static_cast<char*>(rows) + element * 2;
  }

  // Rows behind the last query become zero, as do columns behind the head.
  __device__ __forceinline__ void load_query() {
#pragma unroll 4
    for (int i = thread; i < Shape::kRows * Shape::kUnits; i += kAttentionThreads) {
      const int row = i / Shape::kUnits;
      const int unit = i % Shape::kUnits;
      const bool valid = row < tile.count && unit * 8 < p.head_dim;
      copy_16_or_zero(base + Shape::kQueryOffset + unit_offset(row, unit),
                      head_of(p.query, valid ? row : 0) + (valid ? unit * 16 : 0), valid);
    }
  }

  // Positions that do not exist yet become zero: whatever lies there must not reach a product.
  __device__ __forceinline__ void load_keys_and_values(int step) {
    static_assert(Shape::kKeys * Shape::kUnits % kAttentionThreads == 0);
    const int first = step * Shape::kKeys;
    const char* page = p.cache.pages[tile.first_page + first / plan::kKvPagePositions] +
                       p.cache.layer_offset +
                       static_cast<std::int64_t>(kv_head) * p.cache.head_bytes;
    const std::uint32_t stage = base + step % 2 * Shape::kStageBytes;
    const int in_block = (1 << p.cache.log2_block) - 1;
    const int value_offset = p.cache.block_bytes / 2;
#pragma unroll
    for (int i = 0; i < Shape::kKeys * Shape::kUnits / kAttentionThreads; ++i) {
      const int row = (thread + i * kAttentionThreads) / Shape::kUnits;
      const int unit = (thread + i * kAttentionThreads) % Shape::kUnits;
      const int slot = first % plan::kKvPagePositions + row;
      const bool valid = first + row < end_position && unit * 8 < p.head_dim;
      const char* source = page;
      if (valid)
        source += (slot >> p.cache.log2_block) * p.cache.block_bytes +
                  (slot & in_block) * p.head_dim * 2 + unit * 16;
      const std::uint32_t target = stage + unit_offset(row, unit);
      copy_16_or_zero(target, source, valid);
      copy_16_or_zero(target + Shape::kTileBytes, source + value_offset, valid);
    }
  }

  // Operand A: this warp's queries, elements 16 step to 16 step + 15 of the head.
  __device__ __forceinline__ void read_query(int step, uint4 (&fragment)[kRowTiles]) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = warp_row + 16 * r + lane % 16;
      fragment[r] =
          load_matrix_4(base + Shape::kQueryOffset + unit_offset(row, 2 * step + lane / 16));
    }
  }

  __device__ __forceinline__ void attend(int step) {
    const std::uint32_t stage = base + step % 2 * Shape::kStageBytes;
    float score[kRowTiles][Shape::kKeyTiles][4];
    compute_scores(stage, score);
    const int first = step * Shape::kKeys;
    if (first + Shape::kKeys > tile.position + warp_row + 1) mask(first, score);
    update_softmax(score);
    add_values(stage + Shape::kTileBytes, score);
  }

  __device__ __forceinline__ void compute_scores(
      std::uint32_t keys, float (&score)[kRowTiles][Shape::kKeyTiles][4]) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; ++n)
        score[r][n][0] = score[r][n][1] = score[r][n][2] = score[r][n][3] = 0.0f;
#pragma unroll
    for (int t = 0; t < kHeadSteps; ++t) {
      uint4 query[kRowTiles];
      read_query(t, query);
      // Blocks: keys 0 to 7 at both halves of the 16 elements, then keys 8 to 15.
      const std::uint32_t row = keys + unit_offset(lane / 16 * 8 + lane % 8, 2 * t + lane / 8 % 2);
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; n += 2) {
        const uint4 key = load_matrix_4(row + n * 8 * Shape::kRowBytes);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_16x8x16<T>(score[r][n], query[r], key.x, key.y);
          mma_16x8x16<T>(score[r][n + 1], query[r], key.z, key.w);
        }
      }
    }
  }

  // Score [r][n][i] belongs to query row 16 r + g (+ 8 for i >= 2) and key 8 n + 2 q + i % 2.
  __device__ __forceinline__ void mask(int first,
                                       float (&score)[kRowTiles][Shape::kKeyTiles][4]) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int last_key = tile.position + warp_row + 16 * r + g - first;
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + 2 * q + i % 2 > last_key + i / 2 * 8) score[r][n][i] = -INFINITY;
    }
  }

  // Turns scores into weights relative to the largest score so far. Every row sees key 0 in its
  // first tile, so the largest score is a number from then on.
  __device__ __forceinline__ void update_softmax(float (&score)[kRowTiles][Shape::kKeyTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      float largest[2] = {maximum[r][0], maximum[r][1]};
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], score[r][n][i]);
      largest[0] = warp_max<4>(largest[0]);
      largest[1] = warp_max<4>(largest[1]);
      const bool grown = largest[0] != maximum[r][0] || largest[1] != maximum[r][1];
      if (__any_sync(kAllLanes, grown)) rescale(r, largest);
#pragma unroll
      for (int n = 0; n < Shape::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          score[r][n][i] = exp2_approximately(score[r][n][i] - maximum[r][i / 2]);
          sum[r][i / 2] += score[r][n][i];
        }
    }
  }

  __device__ __forceinline__ void rescale(int r, const float (&largest)[2]) {
    const float factor[2] = {exp2_approximately(maximum[r][0] - largest[0]),
                             exp2_approximately(maximum[r][1] - largest[1])};
    maximum[r][0] = largest[0];
    maximum[r][1] = largest[1];
    sum[r][0] *= factor[0];
    sum[r][1] *= factor[1];
#pragma unroll
    for (int n = 0; n < 2 * kHeadSteps; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[r][n][i] *= factor[i / 2];
  }

  // The result layout of a product is operand A's layout of the next, pair by pair of key tiles.
  __device__ __forceinline__ void add_values(
      std::uint32_t values, const float (&weight)[kRowTiles][Shape::kKeyTiles][4]) {
    // Blocks: elements 0 to 7 at keys 0 to 7 and 8 to 15, then elements 8 to 15.
    const int row = lane % 16;
#pragma unroll
    for (int n = 0; n < Shape::kKeyTiles; n += 2) {
      uint4 weights[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        weights[r] = make_uint4(pack<T>(weight[r][n][0], weight[r][n][1]),
                                pack<T>(weight[r][n][2], weight[r][n][3]),
                                pack<T>(weight[r][n + 1][0], weight[r][n + 1][1]),
                                pack<T>(weight[r][n + 1][2], weight[r][n + 1][3]));
#pragma unroll
      for (int t = 0; t < kHeadSteps; ++t) {
        const uint4 value = load_matrix_4_transposed(values + n * 8 * Shape::kRowBytes +
                                                     unit_offset(row, 2 * t + lane / 16));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma_16x8x16<T>(output[r][2 * t], weights[r], value.x, value.y);
          mma_16x8x16<T>(output[r][2 * t + 1], weights[r], value.z, value.w);
        }
      }
    }
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * r + 8 * half + g;
        const float scale = 1.0f / warp_sum<4>(sum[r][half]);
        if (row >= tile.count) continue;
        auto* target = reinterpret_cast<std::uint32_t*>(head_of(p.heads, row));
#pragma unroll
        for (int n = 0; n < 2 * kHeadSteps; ++n)
          if (8 * n < p.head_dim)
            target[4 * n + q] =
                pack<T>(output[r][n][2 * half] * scale, output[r][n][2 * half + 1] * scale);
      }
  }

  const AttentionParams& p;
  const QueryTile tile;      // no kernel writes it: read without waiting
  const std::uint32_t base;  // of shared memory
  const int thread, lane, g, q;
  const int head, kv_head, warp_row;
  const int end_position;  // keys of this block end before it
  float output[kRowTiles][2 * kHeadSteps][4] = {};
  float maximum[kRowTiles][2];
  float sum[kRowTiles][2] = {};
};

template <typename T, int kHeadSteps>
__global__ void __launch_bounds__(kAttentionThreads, kHeadSteps <= 8 ? 2 : 1)
    attention_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) char shared[];
  AttentionTile<T, kHeadSteps>(params, shared).run();
}

template <typename T, int kHeadSteps>
AttentionKernel attention_instance() {
  using Shape = AttentionShape<kHeadSteps>;
  return {reinterpret_cast<const void*>(attention_kernel<T, kHeadSteps>), Shape::kRows,
          Shape::kSharedBytes};
}

}  // namespace clusterfusion::cuda
