// Attention of many rows as a kernel of its own. A warp has a task of the streaming kernel
// (stream/attention.cuh) and does what that kernel's eight warps do, one after the other, with the
// same arithmetic in the same order. Groups of 16 positions come by asynchronous copies into a ring
// of the warp's own, so warps wait for nobody.
#pragma once

#include "backend/cuda/device/async_copy.cuh"
#include "backend/cuda/device/grid_dependency.cuh"
#include "backend/cuda/gemm/attention_memory.hpp"
#include "backend/cuda/gemm/paired_rows.cuh"
#include "backend/cuda/stream/attention.cuh"
#include "backend/cuda/stream/combiner.cuh"

namespace clusterfusion::cuda::gemm {

using namespace device;

// What stands for stream::Consumer.
struct AttentionWarp {
  static constexpr int kThreads = 32;  // that share a task
  const StreamParams& p;
  char* scratch;
  int thread, warp, lane, g, q;
  struct Ring {
    const char* from;  // the KV block that is attended to, in its page
    __device__ __forceinline__ std::uint64_t copied_from() const {
      return reinterpret_cast<std::uint64_t>(from);
    }
  } ring;

  __device__ __forceinline__ AttentionWarp(const StreamParams& params, char* scratch)
      : p(params),
        scratch(scratch),
        thread(static_cast<int>(threadIdx.x) % 32),
        warp(0),
        lane(thread),
        g(lane / 4),
        q(lane % 4),
        ring{} {}
  __device__ __forceinline__ void barrier() const { __syncwarp(); }
  template <typename Element>
  __device__ __forceinline__ Element* lamport(std::int32_t offset) const {
    return reinterpret_cast<Element*>(p.lamport + offset);
  }
  template <typename T>
  __device__ __forceinline__ T* attention_output(int row, int index) const {
    return lamport<T>(p.layout.attention) + 2 * paired_word(row, index / 2, p.hidden_size / 2) +
           index % 2;
  }
};

__device__ __forceinline__ plan::AttentionSplits splits_of(const StreamParams& p, int row, int step,
                                                           int sm_count) {
  return plan::attention_splits(p.row_table[row].position + step + 1, p.kv_block_positions,
                                p.num_heads, p.head_dim, sm_count);
}

// The groups of positions of one split, in the order of the streaming kernel's warps: all of warp
// 0, then all of warp 1, ... Group n of the context is warp n % 8's.
class GroupOrder {
 public:
  __device__ __forceinline__ GroupOrder(int begin, int end) : begin_(begin), end_(end) { find(); }
  __device__ __forceinline__ bool is_over() const { return warp_ == plan::kConsumerWarps; }
  __device__ __forceinline__ int group() const { return group_; }
  __device__ __forceinline__ int warp() const { return warp_; }
  __device__ __forceinline__ void advance() {
    group_ += plan::kConsumerWarps;
    if (group_ < end_) return;
    ++warp_;
    find();
  }

 private:
  __device__ __forceinline__ void find() {
    for (; warp_ < plan::kConsumerWarps; ++warp_) {
      group_ = begin_ + ((warp_ - begin_) & (plan::kConsumerWarps - 1));
      if (group_ < end_) return;
    }
  }
  int begin_, end_;
  int warp_ = 0, group_ = 0;
};

// One warp's ring of groups of positions: 16 keys and 16 values of a head each.
class GroupRing {
 public:
  static constexpr int kGroup = plan::kMinKvBlockPositions;

  __device__ __forceinline__ GroupRing(const StreamParams& p, char* const* pages, int layer,
                                       int head, char* shared)
      : p_(p),
        pages_(pages),
        layer_(layer),
        head_(head),
        half_bytes_(kGroup * p.head_dim * 2),
        shared_(shared) {}

  // The KV block that a group lies in.
  __device__ __forceinline__ char* block_of(int group) const {
    return stream::kv_block(p_, pages_, layer_, head_, group * kGroup / p_.kv_block_positions);
  }
  __device__ __forceinline__ char* keys(int stage) const {
    return shared_ + stage * 2 * half_bytes_;
  }
  __device__ __forceinline__ char* values(int stage) const { return keys(stage) + half_bytes_; }
  __device__ __forceinline__ void load(int group, int stage) const {
    const char* from = block_of(group) + group * kGroup % p_.kv_block_positions * p_.head_dim * 2;
    const char* value_from = from + p_.kv_block_positions * p_.head_dim * 2;
    const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(keys(stage)));
    for (int byte = static_cast<int>(threadIdx.x) % 32 * 16; byte < half_bytes_; byte += 32 * 16) {
      copy_16(to + byte, from + byte);
      copy_16(to + half_bytes_ + byte, value_from + byte);
    }
  }

 private:
  const StreamParams& p_;
  char* const* pages_;
  int layer_, head_, half_bytes_;
  char* shared_;
};

// Tasks in order of splits, groups of rows, heads; a warp each.
template <typename T, int kHeadSteps>
__global__ void __launch_bounds__(kMaxAttentionWarps * 32)
    attention_kernel(const __grid_constant__ StreamParams p, std::int32_t layer, std::int32_t step,
                     std::int32_t sm_count, std::int32_t splits) {
  using Attention = stream::Attention<T, kHeadSteps, AttentionWarp>;
  constexpr int kStages = kAttentionStages;
  extern __shared__ __align__(128) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int number = static_cast<int>(blockIdx.x * (blockDim.x / 32)) + warp;
  const int task_group = number / p.num_heads % p.groups;
  const RowGroup group = p.group_table[task_group];
  const int last = group.first_row + group.rows - 1;
  const plan::AttentionSplits cut = splits_of(p, last, step, sm_count);
  typename Attention::Task task;
  task.head = number % p.num_heads;
  task.split = number / p.num_heads / p.groups;
  task.splits = cut.splits;
  task.first_row = group.first_row;
  task.rows = group.rows;
  task.first_fresh = group.sequence_first;
  task.first_position = p.row_table[group.sequence_first].position + step;
  if (task.split >= min(splits, cut.splits)) return;

  const AttentionMemory memory = attention_memory(p.head_dim);
  char* own = shared + warp * memory.warp_bytes;
  AttentionWarp block(p, own + memory.ring_bytes);
  const GroupRing ring(p, p.row_table[last].kv_pages, layer, task.head, own);
  constexpr int kGroup = GroupRing::kGroup;
  const int groups_of_block = p.kv_block_positions / kGroup;
  const int begin = task.split * cut.blocks_per_split * groups_of_block;
  const int end =
      min(begin + cut.blocks_per_split * groups_of_block, task.last_position() / kGroup + 1);
  GroupOrder coming(begin, end);
  const auto load = [&](int stage) {
    if (!coming.is_over()) {
      ring.load(coming.group(), stage);
      coming.advance();
    }
    commit_copies();
  };
  // Keys and values of earlier steps are there: the grid before this one waited for theirs.
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  wait_for_dependencies();
  start_dependents();

  Attention attention(block);
  typename Attention::Query query;
  typename Attention::Softmax state;
  attention.begin(task, query, state);
  const int state_floats = plan::kConsumerWarps * (p.head_dim + 2);
  // The first row's states are where the streaming kernel has them, further rows' behind the rest.
  const auto kept = [&](int r) {
    return reinterpret_cast<float*>(block.scratch) +
           (r == 0 ? 0 : memory.extra_floats + (r - 1) * state_floats);
  };
  int stage = 0;
  GroupOrder order(begin, end);
  for (block.warp = 0; block.warp < plan::kConsumerWarps; ++block.warp) {
    attention.clear(state);
    for (; !order.is_over() && order.warp() == block.warp; order.advance()) {
      wait_for_copies_but<kStages - 2>();
      __syncwarp();
      load((stage + kStages - 1) % kStages);
      block.ring.from = ring.block_of(order.group());
      attention.attend_group(task, order.group() * kGroup, ring.keys(stage), ring.values(stage),
                             query, state);
      stage = (stage + 1) % kStages;
    }
    for (int r = 0; r < task.rows; ++r)
      attention.keep(state, r, kept(r) + block.warp * (p.head_dim + 2));
  }
  __syncwarp();
  for (int r = 0; r < task.rows; ++r) attention.merge(task, task.first_row + r, kept(r));
}

// Grid: elements of a row by threads, rows.
template <typename T>
__global__ void combine_kernel(const __grid_constant__ StreamParams p, std::int32_t step,
                               std::int32_t sm_count) {
  wait_for_dependencies();
  start_dependents();
  const int row = static_cast<int>(blockIdx.y);
  const int splits = splits_of(p, row, step, sm_count).splits;
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (splits == 1 || index >= p.num_heads * p.head_dim) return;
  T* output = reinterpret_cast<T*>(p.lamport + p.layout.attention) +
              2 * paired_word(row, index / 2, p.hidden_size / 2) + index % 2;
  *output = static_cast<T>(stream::combine_splits(p, p.lamport, row, index, splits));
}

}  // namespace clusterfusion::cuda::gemm
