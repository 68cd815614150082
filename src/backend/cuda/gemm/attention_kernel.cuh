// Attention of many rows as a kernel of its own. A block of few warps has a task of the streaming
// kernel (stream/attention.cuh) and does what that kernel's eight warps do, each of its warps
// several of them one after the other, with the same arithmetic in the same order. Groups of 16
// positions come by asynchronous copies into a ring of each warp's own.
#pragma once

#include "backend/cuda/gemm/attention_memory.hpp"
#include "backend/cuda/gemm/product_input.hpp"
#include "backend/cuda/ptx/async_copy.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/stream/attention.cuh"
#include "backend/cuda/stream/split_combiner.cuh"

namespace clusterfusion::cuda::gemm {

using namespace device;

// What stands for stream::Consumer.
struct AttentionBlock {
  static constexpr int kThreads = kAttentionWarps * 32;  // that share a task
  static constexpr int kInputsAtOnce = 4;                // of a thread, whose loads are under way
  const StreamParams& p;
  char* scratch;
  int thread, warp, lane, g, q;  // warp: the streaming kernel's
  float inverse_head_dim;
  struct Ring {
    const char* from;  // the KV block that is attended to, in its page
    __device__ __forceinline__ std::uint64_t copied_from() const {
      return reinterpret_cast<std::uint64_t>(from);
    }
  } ring;

  __device__ __forceinline__ AttentionBlock(const StreamParams& params, char* scratch)
      : p(params),
        scratch(scratch),
        thread(static_cast<int>(threadIdx.x)),
        warp(0),
        lane(thread % 32),
        g(lane / 4),
        q(lane % 4),
        inverse_head_dim(1.0f / static_cast<float>(params.head_dim)),
        ring{} {}
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
  // index / head_dim: exact, as both are small.
  __device__ __forceinline__ int vector_of(int index) const {
    return static_cast<int>((static_cast<float>(index) + 0.5f) * inverse_head_dim);
  }
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

// The groups of positions of one split, in the order of the streaming kernel's warps, of which this
// warp does every kAttentionWarps-th. Group n of the context is warp n % 8's.
class GroupOrder {
 public:
  __device__ __forceinline__ GroupOrder(int first_warp, int begin, int end)
      : begin_(begin), end_(end), warp_(first_warp) {
    find();
  }
  __device__ __forceinline__ bool is_over() const { return warp_ >= plan::kConsumerWarps; }
  __device__ __forceinline__ int group() const { return group_; }
  __device__ __forceinline__ int warp() const { return warp_; }
  __device__ __forceinline__ void advance() {
    group_ += plan::kConsumerWarps;
    if (group_ < end_) return;
    warp_ += kAttentionWarps;
    find();
  }

 private:
  __device__ __forceinline__ void find() {
    for (; warp_ < plan::kConsumerWarps; warp_ += kAttentionWarps) {
      group_ = begin_ + ((warp_ - begin_) & (plan::kConsumerWarps - 1));
      if (group_ < end_) return;
    }
  }
  int begin_, end_;
  int warp_, group_ = 0;
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

template <typename Task>
__device__ __forceinline__ Task task_of(const StreamParams& p, const RowGroup& group, int head,
                                        int split, int splits, int layer, int step) {
  Task task;
  task.head = head;
  task.split = split;
  task.splits = splits;
  task.ablated = p.ablated.has_head(layer * p.num_heads + head);
  task.first_row = group.first_row;
  task.rows = group.rows;
  task.first_fresh = group.sequence_first;
  task.first_position = p.row_table[group.sequence_first].position + step;
  return task;
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

// Where the warps' states of each query are in scratch: the first query's where the streaming
// kernel has them, further ones' behind the rest.
class KeptStates {
 public:
  __device__ __forceinline__ KeptStates(char* scratch, int head_dim, int extra_floats)
      : first_(reinterpret_cast<float*>(scratch)),
        floats_(plan::kConsumerWarps * (head_dim + 2)),
        extra_floats_(extra_floats) {}
  __device__ __forceinline__ float* of_query(int r) const {
    return first_ + (r == 0 ? 0 : extra_floats_ + (r - 1) * floats_);
  }

 private:
  float* first_;
  int floats_, extra_floats_;
};

// A split, by the warps of the streaming kernel that this warp stands for, and what they found.
template <typename Attention>
__device__ __forceinline__ void attend_split(AttentionBlock& block, int warp, const Extent& extent,
                                             const typename Attention::Task& task,
                                             const GroupRing& ring, GroupLoader& loader,
                                             int extra_floats) {
  constexpr int kStages = kAttentionStages;
  Attention attention(block);
  typename Attention::Query query;
  typename Attention::Softmax state;
  attention.begin(task, query, state);
  const KeptStates kept(block.scratch, block.p.head_dim, extra_floats);
  int stage = 0;
  GroupOrder order(warp, extent.begin, extent.end);
  for (block.warp = warp; block.warp < plan::kConsumerWarps; block.warp += kAttentionWarps) {
    attention.clear(state);
    for (; !order.is_over() && order.warp() == block.warp; order.advance()) {
      wait_for_copies_but<kStages - 2>();
      __syncwarp();
      loader.load(stage == 0 ? kStages - 1 : stage - 1);
      block.ring.from = ring.block_of(order.group());
      attention.attend_group(task, order.group() * GroupRing::kGroup, ring.keys(stage),
                             ring.values(stage), query, state);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    for (int r = 0; r < task.rows; ++r)
      attention.keep(state, r, kept.of_query(r) + block.warp * (block.p.head_dim + 2));
  }
  __syncthreads();
  for (int r = 0; r < task.rows; ++r) attention.merge(task, task.first_row + r, kept.of_query(r));
}

// Grid: heads, groups of rows, splits. A block has a task.
template <typename T, int kHeadSteps>
__global__ void __launch_bounds__(kAttentionWarps * 32, 8)
    attention_kernel(const __grid_constant__ StreamParams p, AttentionMemory memory,
                     std::int32_t layer, std::int32_t step, std::int32_t sm_count) {
  using Attention = stream::Attention<T, kHeadSteps, AttentionBlock>;
  start_dependents();
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const RowGroup group = p.group_table[blockIdx.y];
  const int last = group.first_row + group.rows - 1;
  const int head = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.z);
  const Extent extent = extent_of(p, last, split, step, sm_count, static_cast<int>(gridDim.z));
  const auto task =
      task_of<typename Attention::Task>(p, group, head, split, extent.splits, layer, step);
  if (split >= extent.splits) return;

  AttentionBlock block(p, shared + kAttentionWarps * memory.ring_bytes);
  const GroupRing ring(p, p.row_table[last].kv_pages, layer, head,
                       shared + warp * memory.ring_bytes);
  GroupLoader loader(ring, warp, extent);
  // Keys and values of earlier steps are there: before this layer's products the kernel of the
  // residual stream lets others begin when all before it is over, and no sooner.
  loader.load_first();
  wait_for_dependencies();
  attend_split<Attention>(block, warp, extent, task, ring, loader, memory.extra_floats);
}

// Grid: elements of a row by threads, rows.
template <typename T>
__global__ void combine_kernel(const __grid_constant__ StreamParams p, std::int32_t layer,
                               std::int32_t step, std::int32_t sm_count) {
  start_dependents();
  wait_for_dependencies();
  const int row = static_cast<int>(blockIdx.y);
  const int splits = splits_of(p, row, step, sm_count).splits;
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (splits == 1 || index >= p.num_heads * p.head_dim) return;
  T* output = reinterpret_cast<T*>(p.lamport + p.layout.attention) +
              2 * input_word(row, index / 2, input_lines(p.rows)) + index % 2;
  const bool ablated = p.ablated.has_head(layer * p.num_heads + index / p.head_dim);
  *output =
      static_cast<T>(ablated ? 0.0f : stream::combine_splits(p, p.lamport, row, index, splits));
}

}  // namespace clusterfusion::cuda::gemm
