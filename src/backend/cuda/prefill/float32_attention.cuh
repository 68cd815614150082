// Causal attention over KV pages of float32, without tensor cores, which would round queries and
// keys: each warp owns rows of queries and walks over tiles of keys with an online softmax. A lane
// has a key while scores are taken, and elements of the head while values are added.
//
// The result of a row depends on its own query and on the keys up to its position, in one fixed
// order: neither on what else is computed, nor on where the pages lie. So every product that is
// added to something is an explicit fmaf, in code for one row as in code for many.
#pragma once

#include <cmath>

#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/prefill/attention.hpp"
#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/ptx/mbarrier.cuh"
#include "plan/decode_plan.hpp"

namespace clusterfusion::cuda {

using namespace device;

// Sizes of an instance for head sizes up to 64 x kPairs: a lane has so many pairs of elements.
template <int kPairs>
struct Float32AttentionShape {
  static constexpr int kWarps = kAttentionThreads / 32;
  static constexpr int kMaxHeadDim = 64 * kPairs;
  // Rows of a warp: a key or value that is read from shared memory serves them all. The largest
  // heads have neither registers nor shared memory for more.
  static constexpr int kWarpRows = kPairs <= 2 ? 8 : 4;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = 32;  // of a tile: one for each lane
  // Rows in shared memory are an odd number of 16-byte units, so that the same unit of eight
  // neighbouring keys lies in different banks.
  static constexpr int kRowFloats = kMaxHeadDim + 4;
  static constexpr int kTileFloats = kKeys * kRowFloats;
  static constexpr int kStages = kPairs <= 2 ? 4 : 2;
  // Shared memory: stages of keys or values, then queries, then the warps' softmax weights.
  static constexpr int kQueryOffset = kStages * kTileFloats;
  static constexpr int kWeightOffset = kQueryOffset + kRows * kRowFloats;
  static constexpr int kSharedBytes = 4 * (kWeightOffset + kRows * kKeys);
  static_assert(kSharedBytes <= 99 * 1024, "what a block has on sm_120");
  static_assert(plan::kKvPagePositions % kKeys == 0, "a tile lies in one page");
};

template <typename T, int kPairs>
class Float32AttentionTile {
 public:
  using Shape = Float32AttentionShape<kPairs>;

  __device__ __forceinline__ Float32AttentionTile(const AttentionParams& params, float* shared)
      : p(params),
        tile(params.tiles[blockIdx.y]),
        stages(shared),
        queries(shared + Shape::kQueryOffset),
        weights(shared + Shape::kWeightOffset + threadIdx.x / 32 * Shape::kWarpRows * Shape::kKeys),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        head(blockIdx.x),
        kv_head(blockIdx.x / params.heads_per_kv_head),
        end_position(tile.position + tile.count),
        num_tiles(2 * ((end_position + Shape::kKeys - 1) / Shape::kKeys)),
        warp_rows((tile.count - warp + Shape::kWarps - 1) / Shape::kWarps) {
#pragma unroll
    for (int r = 0; r < Shape::kWarpRows; ++r) maximum[r] = -INFINITY;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) pair[j] = min(lane + 32 * j, p.head_dim / 2 - 1);
  }

  __device__ __forceinline__ void run() {
    wait_for_dependencies();
    if (tile.count == 0) return;
    load_queries();
#pragma unroll
    for (int index = 0; index < Shape::kStages - 1; ++index) load_tile(index);
    for (int index = 0; index < num_tiles; index += 2) {
      const int first = index / 2 * Shape::kKeys;
      const float* keys = next_tile(index);
      if (warp_rows == 1)
        attend<1>(keys, first);
      else if (warp_rows > 1)
        attend<Shape::kWarpRows>(keys, first);
      const float* values = next_tile(index + 1);
      const bool masked = first + Shape::kKeys > position_of(0) + 1;
      if (warp_rows == 1)
        masked ? add_values<1, true>(values, first) : add_values<1, false>(values, first);
      else if (warp_rows > 1)
        masked ? add_values<Shape::kWarpRows, true>(values, first)
               : add_values<Shape::kWarpRows, false>(values, first);
    }
    store();
  }

 private:
  // The tile's rows go to the warps in turn, so that few rows are spread over all of them.
  __device__ __forceinline__ int row_of(int r) const { return warp + Shape::kWarps * r; }
  __device__ __forceinline__ int position_of(int r) const { return tile.position + row_of(r); }

  // The first element of this head, in queries or outputs.
  __device__ __forceinline__ std::int64_t head_of(int row) const {
    return (static_cast<std::int64_t>(tile.row + row) * p.num_heads + head) * p.head_dim;
  }

  // One row of the head, by eight lanes; zeros if not `valid`.
  __device__ __forceinline__ void copy_row(float* to, const char* from, bool valid) const {
    const std::uint32_t address = shared_address(to);
#pragma unroll
    for (int j = 0; j < Shape::kMaxHeadDim / 32; ++j) {
      const int unit = lane % 8 + 8 * j;
      if (unit * 4 < p.head_dim) copy_16_or_zero(address + unit * 16, from + unit * 16, valid);
    }
  }

  // Rows behind the last query become zero.
  __device__ __forceinline__ void load_queries() const {
    const float* from = static_cast<const float*>(p.query);
#pragma unroll
    for (int i = 0; i < Shape::kRows / (4 * Shape::kWarps); ++i) {
      const int row = 4 * (warp + Shape::kWarps * i) + lane / 8;
      const bool valid = row < tile.count;
      copy_row(queries + row * Shape::kRowFloats,
               reinterpret_cast<const char*>(from + head_of(valid ? row : 0)), valid);
    }
  }

  // Tiles alternate: keys, then the values of the same positions. Positions that do not exist yet
  // become zero: whatever lies there must not reach a sum.
  __device__ __forceinline__ void load_tile(int index) const {
    if (index < num_tiles) {
      const int first = index / 2 * Shape::kKeys;
      const char* page = p.cache.pages[tile.first_page + first / plan::kKvPagePositions] +
                         p.cache.layer_offset +
                         static_cast<std::int64_t>(kv_head) * p.cache.head_bytes +
                         index % 2 * (p.cache.block_bytes / 2);
      float* stage = stages + index % Shape::kStages * Shape::kTileFloats;
      const int in_block = (1 << p.cache.log2_block) - 1;
#pragma unroll
      for (int i = 0; i < Shape::kKeys / (4 * Shape::kWarps); ++i) {
        const int row = 4 * (warp + Shape::kWarps * i) + lane / 8;
        const int slot = first % plan::kKvPagePositions + row;
        copy_row(stage + row * Shape::kRowFloats,
                 page + (slot >> p.cache.log2_block) * p.cache.block_bytes +
                     (slot & in_block) * p.head_dim * 4,
                 first + row < end_position);
      }
    }
    commit_copies();
  }

  // Waits for a tile, and starts to load the one that comes into the place of the tile before.
  __device__ __forceinline__ const float* next_tile(int index) const {
    wait_for_copies_but<Shape::kStages - 2>();
    // The tile has landed for everybody, and everybody is done with the one before.
    __syncthreads();
    load_tile(index + Shape::kStages - 1);
    return stages + index % Shape::kStages * Shape::kTileFloats;
  }

  // Scores of this lane's key, and their weights. Four sums of each: they are shorter, so they lose
  // less of large scores, and do not wait for each other.
  template <int kCount>
  __device__ __forceinline__ void attend(const float* keys, int first) {
    const float* own_key = keys + lane * Shape::kRowFloats;
    float4 sums[kCount] = {};
#pragma unroll 4
    for (int dim = 0; dim < p.head_dim; dim += 4) {
      const float4 k = *reinterpret_cast<const float4*>(own_key + dim);
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const float4 q =
            *reinterpret_cast<const float4*>(queries + row_of(r) * Shape::kRowFloats + dim);
        sums[r].x = fmaf(q.x, k.x, sums[r].x);
        sums[r].y = fmaf(q.y, k.y, sums[r].y);
        sums[r].z = fmaf(q.z, k.z, sums[r].z);
        sums[r].w = fmaf(q.w, k.w, sums[r].w);
      }
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float score = (sums[r].x + sums[r].y) + (sums[r].z + sums[r].w);
      update_softmax(r, first + lane <= position_of(r) ? score : -INFINITY);
    }
  }

  // Turns scores into weights relative to the largest score so far. Every row sees key 0 in its
  // first tile, so the largest score is a number from then on.
  __device__ __forceinline__ void update_softmax(int r, float score) {
    const float largest = fmaxf(maximum[r], warp_max(score));
    if (largest != maximum[r]) {
      const float factor = exp2_approximately(maximum[r] - largest);
      maximum[r] = largest;
      sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        output[r][j].x *= factor;
        output[r][j].y *= factor;
      }
    }
    const float weight = exp2_approximately(score - largest);
    sum[r] = __fadd_rn(sum[r], weight);
    weights[r * Shape::kKeys + lane] = weight;
  }

  // Key after key. Where a row does not see all keys, those behind it are left out: a value that is
  // not finite would come through a weight of zero.
  template <int kCount, bool kMasked>
  __device__ __forceinline__ void add_values(const float* values, int first) {
#pragma unroll 2
    for (int key = 0; key < Shape::kKeys; key += 4) {
      float2 value[4][kPairs];
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < kPairs; ++j)
          value[k][j] = *reinterpret_cast<const float2*>(values + (key + k) * Shape::kRowFloats +
                                                         2 * pair[j]);
#pragma unroll
      for (int r = 0; r < kCount; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(weights + r * Shape::kKeys + key);
        const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (kMasked && first + key + k > position_of(r)) continue;
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            output[r][j].x = fmaf(weight[k], value[k][j].x, output[r][j].x);
            output[r][j].y = fmaf(weight[k], value[k][j].y, output[r][j].y);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store() const {
    auto* heads = static_cast<T*>(p.heads);
#pragma unroll
    for (int r = 0; r < Shape::kWarpRows; ++r) {
      if (r >= warp_rows) continue;
      const float scale = 1.0f / warp_sum(sum[r]);
      auto* target = reinterpret_cast<std::uint32_t*>(heads + head_of(row_of(r)));
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (lane + 32 * j < p.head_dim / 2)
          target[pair[j]] = pack<T>(output[r][j].x * scale, output[r][j].y * scale);
    }
  }

  const AttentionParams& p;
  const QueryTile tile;  // no kernel writes it: read without waiting
  float* const stages;
  float* const queries;
  float* const weights;  // of this warp: [kWarpRows, kKeys]
  const int warp, lane, head, kv_head;
  const int end_position;  // keys of this block end before it
  const int num_tiles;     // of keys and of values
  const int warp_rows;     // of this warp
  int pair[kPairs];        // of elements of a head; twice the last one where there are no more
  float2 output[Shape::kWarpRows][kPairs] = {};
  float maximum[Shape::kWarpRows];
  float sum[Shape::kWarpRows] = {};  // of this lane's keys
};

template <typename T, int kPairs>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    float32_attention_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(16) float float32_shared[];
  Float32AttentionTile<T, kPairs>(params, float32_shared).run();
}

}  // namespace clusterfusion::cuda
