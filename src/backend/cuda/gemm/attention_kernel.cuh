// Attention of many rows as a kernel of its own. A block of few warps has a task of the streaming
// kernel (stream/attention_task.cuh) and computes its shares, each of its warps several of them one
// after the other. Groups of 16 positions come by asynchronous copies into a ring of each warp's
// own.
#pragma once

#include "backend/cuda/gemm/attention_memory.hpp"
#include "backend/cuda/gemm/product_input.hpp"
#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/stream/attention_inputs.cuh"
#include "backend/cuda/stream/attention_merge.cuh"
#include "backend/cuda/stream/attention_share.cuh"
#include "backend/cuda/stream/split_combiner.cuh"

namespace clusterfusion::cuda::gemm {

using namespace device;

// Where inputs come from and results go.
struct RowsPlace {
  const StreamParams& p;
  template <typename Element>
  __device__ __forceinline__ Element* lamport(std::int32_t offset) const {
    return reinterpret_cast<Element*>(p.lamport + offset);
  }
  template <typename T>
  __device__ __forceinline__ T* attention_output(int row, int index) const {
    return lamport<T>(p.layout.attention) + 2 * input_word(row, index / 2, input_lines(p.rows)) +
           index % 2;
  }
};

__device__ __forceinline__ plan::AttentionSplits splits_of(const StreamParams& p, int row, int step,
                                                           int sm_count) {
  return plan::attention_splits(p.row_table[row].position + step + 1, p.kv_block_positions,
                                p.num_heads, p.head_dim, sm_count);
}

// The groups of positions of one split, share after share, of which this warp does every
// kAttentionWarps-th.
class GroupOrder {
 public:
  __device__ __forceinline__ GroupOrder(int first_share, int begin, int end)
      : begin_(begin), end_(end), share_(first_share) {
    find();
  }
  __device__ __forceinline__ bool is_over() const { return share_ >= plan::kConsumerWarps; }
  __device__ __forceinline__ int group() const { return group_; }
  __device__ __forceinline__ int share() const { return share_; }
  __device__ __forceinline__ void advance() {
    group_ += plan::kConsumerWarps;
    if (group_ < end_) return;
    share_ += kAttentionWarps;
    find();
  }

 private:
  __device__ __forceinline__ void find() {
    for (; share_ < plan::kConsumerWarps; share_ += kAttentionWarps) {
      group_ = begin_ + ((share_ - begin_) & (plan::kConsumerWarps - 1));
      if (group_ < end_) return;
    }
  }
  int begin_, end_;
  int share_, group_ = 0;
};

// One warp's ring of groups of positions: 16 keys and 16 values of a head each.
class GroupRing {
 public:
  static constexpr int kGroup = plan::kMinKvBlockPositions;
  static constexpr int kPageGroups = plan::kKvPagePositions / kGroup;

  __device__ __forceinline__ GroupRing(const StreamParams& p, char* const* pages, int layer,
                                       int head, char* shared)
      : pages_(pages),
        of_head_(static_cast<std::int64_t>(layer * p.num_heads + head) * p.kv_head_bytes),
        block_positions_log2_(p.kv_block_positions == 64   ? 6
                              : p.kv_block_positions == 32 ? 5
                                                           : 4),
        block_bytes_(p.kv_block_bytes),
        row_bytes_(p.head_dim * 2),
        shared_(shared) {}

  // The KV block that a group lies in.
  __device__ __forceinline__ char* block_of(int group) const {
    const int block = group % kPageGroups * kGroup >> block_positions_log2_;
    return pages_[group / kPageGroups] + of_head_ + block * block_bytes_;
  }
  __device__ __forceinline__ char* keys(int stage) const {
    return shared_ + stage * 2 * kGroup * row_bytes_;
  }
  __device__ __forceinline__ char* values(int stage) const {
    return keys(stage) + kGroup * row_bytes_;
  }
  __device__ __forceinline__ void load(int group, int stage) const {
    const int block_positions = 1 << block_positions_log2_;
    const int lane_byte = static_cast<int>(threadIdx.x) % 32 * 16;
    const char* from =
        block_of(group) + (group * kGroup & (block_positions - 1)) * row_bytes_ + lane_byte;
    const char* value_from = from + block_positions * row_bytes_;
    const std::uint32_t to = shared_address(keys(stage)) + lane_byte;
    const int bytes = kGroup * row_bytes_;
#pragma unroll 5
    for (int byte = 0; byte < bytes; byte += 32 * 16)
      if (byte + lane_byte < bytes) {
        copy_16(to + byte, from + byte);
        copy_16(to + bytes + byte, value_from + byte);
      }
  }

 private:
  char* const* pages_;
  std::int64_t of_head_;
  int block_positions_log2_, block_bytes_, row_bytes_;
  char* shared_;
};

// The groups of positions of a task's split: [begin, end).
struct Extent {
  int splits, begin, end;
};
__device__ __forceinline__ Extent extent_of(const StreamParams& p, int row, int split, int step,
                                            int sm_count, int most_splits) {
  constexpr int kGroup = GroupRing::kGroup;
  const int groups = (p.row_table[row].position + step) / kGroup + 1;
  if (most_splits == 1) return {1, 0, groups};
  const plan::AttentionSplits cut = splits_of(p, row, step, sm_count);
  const int groups_of_split = cut.blocks_per_split * (p.kv_block_positions / kGroup);
  const int begin = split * groups_of_split;
  return {cut.splits, begin, min(begin + groups_of_split, groups)};
}

// Loads a warp's groups into its ring, one after the other.
class GroupLoader {
 public:
  __device__ __forceinline__ GroupLoader(const GroupRing& ring, int warp, const Extent& extent)
      : ring_(ring), coming_(warp, extent.begin, extent.end) {}
  // The next group, if there is one: a group of copies either way.
  __device__ __forceinline__ void load(int stage) {
    if (!coming_.is_over()) {
      ring_.load(coming_.group(), stage);
      coming_.advance();
    }
    commit_copies();
  }
  __device__ __forceinline__ void load_first() {
#pragma unroll
    for (int stage = 0; stage < kAttentionStages - 1; ++stage) load(stage);
  }

 private:
  const GroupRing& ring_;
  GroupOrder coming_;
};

// A task, whose shares the block's warps compute in turn.
template <typename T, int kHeadSteps>
__device__ __forceinline__ void attend_split(const StreamParams& p,
                                             const stream::AttentionTask& task,
                                             const Extent& extent, const GroupRing& ring,
                                             GroupLoader& loader, bool ablated, char* zeros,
                                             char* task_memory) {
  constexpr int kStages = kAttentionStages;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const RowsPlace place{p};
  const stream::TaskMemory<T> memory(task_memory, p);
  const stream::Team team{thread, kAttentionWarps * 32};
  stream::AttentionInputs<T>(p, place.lamport<const float>(p.layout.qkv))
      .prepare(task, memory, team);
  if (thread < kZeroBytes / 4) reinterpret_cast<std::uint32_t*>(zeros)[thread] = 0;
  __syncthreads();
  stream::AttentionShare<T, kHeadSteps, 1> share(p.head_dim, lane, zeros);
  share.begin(task, memory);
  int stage = 0;
  GroupOrder order(warp, extent.begin, extent.end);
  for (int which = warp; which < plan::kConsumerWarps; which += kAttentionWarps) {
    share.clear();
    for (; !order.is_over() && order.share() == which; order.advance()) {
      wait_for_copies_but<kStages - 2>();
      __syncwarp();
      loader.load(stage == 0 ? kStages - 1 : stage - 1);
      const int first = order.group() * GroupRing::kGroup;
      share.attend(task, first, shared_address(ring.keys(stage)),
                   shared_address(ring.values(stage)));
      if (task.position(0) < first + GroupRing::kGroup)
        stream::store_fresh<T>(task, memory, p, first, ring.block_of(order.group()), lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    share.keep(task, memory, which);
  }
  __syncthreads();
  for (int r = 0; r < task.rows; ++r)
    stream::merge_shares<T>(place, task, memory, r, ablated, team);
}

// Grid: heads, groups of rows, splits. A block has a task.
template <typename T, int kHeadSteps>
__global__ void __launch_bounds__(kAttentionWarps * 32, 8)
    attention_kernel(const __grid_constant__ StreamParams p, std::int32_t layer, std::int32_t step,
                     std::int32_t sm_count) {
  start_dependents();
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const plan::RowGroup group = p.group_table[blockIdx.y];
  const int last = group.first_row + group.rows - 1;
  const int head = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.z);
  const Extent extent = extent_of(p, last, split, step, sm_count, static_cast<int>(gridDim.z));
  const stream::AttentionTask task =
      stream::make_task(group, p.row_table[group.sequence_first].position + step, head, split,
                        extent.splits, extent.end * GroupRing::kGroup);
  if (split >= extent.splits) return;

  const int ring_bytes = attention_ring_bytes(p.head_dim);
  char* zeros = shared + kAttentionWarps * ring_bytes;
  const GroupRing ring(p, p.row_table[last].kv_pages, layer, head, shared + warp * ring_bytes);
  GroupLoader loader(ring, warp, extent);
  // Keys and values of earlier steps are there: before this layer's products the kernel of the
  // residual stream lets others begin when all before it is over, and no sooner.
  loader.load_first();
  wait_for_dependencies();
  attend_split<T, kHeadSteps>(p, task, extent, ring, loader,
                              p.ablated.has_head(layer * p.num_heads + head), zeros,
                              zeros + kZeroBytes);
}

// Grid: pairs of a row's elements by threads, rows.
template <typename T>
__global__ void combine_kernel(const __grid_constant__ StreamParams p, std::int32_t layer,
                               std::int32_t step, std::int32_t sm_count) {
  start_dependents();
  wait_for_dependencies();
  const int row = static_cast<int>(blockIdx.y);
  const int splits = splits_of(p, row, step, sm_count).splits;
  const int pair = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), index = 2 * pair;
  if (splits == 1 || index >= p.num_heads * p.head_dim) return;
  const float2 value = p.ablated.has_head(layer * p.num_heads + index / p.head_dim)
                           ? make_float2(0.0f, 0.0f)
                           : stream::Partials(p, p.lamport, row, index, splits).merge();
  reinterpret_cast<std::uint32_t*>(p.lamport +
                                   p.layout.attention)[input_word(row, pair, input_lines(p.rows))] =
      pack<T>(value.x, value.y);
}

}  // namespace clusterfusion::cuda::gemm
