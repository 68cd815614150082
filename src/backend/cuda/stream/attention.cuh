// Attention of the step's rows over what lands of the KV cache, by the consumer warps.
//
// As many of a block's tasks as there is shared memory for are a batch: the inputs of all are
// prepared at once, each warp computes a share of every task, and all are merged at once. So what
// takes long, a trip to another SM or a barrier, is waited for once.
#pragma once

#include "backend/cuda/stream/attention_inputs.cuh"
#include "backend/cuda/stream/attention_merge.cuh"
#include "backend/cuda/stream/attention_schedule.cuh"
#include "backend/cuda/stream/attention_share.cuh"
#include "backend/cuda/stream/consumer.cuh"
#include "backend/cuda/stream/partial_sums.cuh"

namespace clusterfusion::cuda::stream {

// `kMaxSteps`: 16-wide steps of a head, `kMaxQueries`: queries of a task (4, 8 or 16), at most.
template <typename T, int kMaxSteps, int kMaxQueries>
class Attention {
 public:
  __device__ __forceinline__ explicit Attention(Consumer& consumer) : c(consumer) {}

  // Which tasks this block has in every layer of this step, in the order in which the scheduler
  // announces them. By all threads, when none is at attention.
  __device__ __forceinline__ void plan_step(int step) const {
    if (c.warp == 0) {
      const bool has_group = c.lane < c.p.groups;
      plan::AttentionSplits cut;
      if (has_group) cut = splits_of_group(c.p, *c.control, c.lane, step);
      const int splits = has_group ? cut.splits : 0;
      int before = 0;  // tasks of the groups before
      for (int index = 0; index < c.p.groups; ++index) {
        const int its_splits = __shfl_sync(kAllLanes, splits, index);
        if (index < c.lane) before += c.p.num_heads * its_splits;
      }
      const int task = task_of_block(before);
      const bool has_task = task < c.p.num_heads * splits;
      const unsigned have = __ballot_sync(kAllLanes, has_task);
      if (has_task) {
        const plan::RowGroup& group = c.control->groups[c.lane];
        const int split = task % splits;
        c.control->tasks[__popc(have & ((1u << c.lane) - 1))] =
            make_task(group, c.control->rows[group.sequence_first].position + step, task / splits,
                      split, splits, (split + 1) * cut.blocks_per_split * c.p.kv_block_positions);
      }
      if (c.lane == 0) c.control->num_tasks = __popc(have);
    }
    c.barrier();
  }

  // All tasks of this block in this layer. Where partial sums lie in their memory, this waits for
  // the reducers, as late as it can.
  __device__ __forceinline__ void run(int layer, const PartialWriter& partials) {
    if (!c.p.keeps_inputs) partials.drain();
    c.make_indices_opaque();
    run_by_quads<kMaxQueries / plan::kQuadQueries>(layer, partials);
    c.barrier();
  }

 private:
  template <int kQuads>
  using Share = AttentionShare<T, kMaxSteps, kQuads>;
  static constexpr int kGroup = Share<1>::kGroup;

  // With as few quads as the largest of the step's tasks needs.
  template <int kMaxQuads>
  __device__ __forceinline__ void run_by_quads(int layer, const PartialWriter& partials) {
    if constexpr (kMaxQuads > 1)
      if (c.p.task_queries <= kMaxQuads / 2 * plan::kQuadQueries)
        return run_by_quads<kMaxQuads / 2>(layer, partials);
    run_tasks<kMaxQuads>(layer, partials);
  }
  template <int kQuads>
  __device__ __forceinline__ void run_tasks(int layer, const PartialWriter& partials) {
    Share<kQuads> share(c.p.head_dim, c.lane, &c.control->zeros);
    const int count = c.control->num_tasks;
    for (int first = 0; first < count; first += c.p.task_slots)
      run_batch(first, min(c.p.task_slots, count - first), layer, share, partials);
  }
  template <int kQuads>
  __device__ __forceinline__ void run_batch(int first, int count, int layer, Share<kQuads>& share,
                                            const PartialWriter& partials) {
    // A team of warps prepares and merges a task. Of three tasks' eight warps two have none.
    const int warps = count == 1   ? plan::kConsumerWarps
                      : count == 2 ? plan::kConsumerWarps / 2
                                   : plan::kConsumerWarps / 4;
    const int own = c.warp / warps;
    const Team team{c.thread - own * warps * 32, warps * 32};
    if (own < count)
      AttentionInputs<T>(c.p, c.template lamport<const float>(c.p.layout.qkv))
          .prepare(c.control->tasks[first + own], memory_of(own), team);
    c.barrier();
    for (int i = 0; i < count; ++i)
      // The warps take the shares in turn, so that none has the longest each time.
      compute(c.control->tasks[first + i], memory_of(i), (c.warp + i) % plan::kConsumerWarps, share,
              partials);
    c.barrier();
    if (own < count) merge(c.control->tasks[first + own], memory_of(own), layer, team);
  }
  // By a team, of which each query has a part.
  __device__ __forceinline__ void merge(const AttentionTask task, const TaskMemory<T>& memory,
                                        int layer, const Team& team) {
    const bool ablated = c.p.ablated.has_head(layer * c.p.num_heads + task.head);
    const int parts = min(task.rows < 3 ? task.rows : task.rows <= 4 ? 4 : 8, team.threads / 32);
    const int threads = team.threads / parts;
    const int own = team.thread / threads;
    for (int r = own; r < task.rows; r += parts)
      merge_shares<T>(c, task, memory, r, ablated, {team.thread - own * threads, threads});
  }
  __device__ __forceinline__ TaskMemory<T> memory_of(int slot) const {
    return {c.scratch + c.p.tasks_offset + slot * c.p.task_layout.bytes, c.p};
  }

  // A share of the task whose blocks come next.
  template <int kQuads>
  __device__ __forceinline__ void compute(const AttentionTask task, const TaskMemory<T>& memory,
                                          int which, Share<kQuads>& share,
                                          const PartialWriter& partials) {
    share.begin(task, memory);
    // What the scheduler has announced: the first of the task's KV blocks, and the end.
    const RingLabel blocks = c.next.label;
    for (int block = blocks.first; block < blocks.second; ++block) {
      c.ring.wait_landed();
      attend_block(task, memory, block, which, share);
      c.ring.release(c.lane);
    }
    c.await_announcement();
    if (!c.p.keeps_tasks) partials.drain();
    share.keep(task, memory, which);
  }

  // The share's group of positions of one block, which has landed.
  template <int kQuads>
  __device__ __forceinline__ void attend_block(const AttentionTask& task,
                                               const TaskMemory<T>& memory, int block, int which,
                                               Share<kQuads>& share) {
    const int groups = c.p.kv_block_positions / kGroup;
    const int group = (which - block * groups) & (plan::kConsumerWarps - 1);
    const int first = block * c.p.kv_block_positions + group * kGroup;
    if (group >= groups || first > task.last_position()) return;
    const int row_bytes = c.p.head_dim * 2;
    const std::uint32_t keys = c.ring.data() + group * kGroup * row_bytes;
    share.attend(task, first, keys, keys + c.p.kv_block_positions * row_bytes);
    // The producers of later steps wait for it, and have the fence.
    if (task.position(0) < first + kGroup)
      store_fresh<T>(task, memory, c.p, first, reinterpret_cast<char*>(c.ring.copied_from()),
                     c.lane);
  }

  Consumer& c;
};

}  // namespace clusterfusion::cuda::stream
