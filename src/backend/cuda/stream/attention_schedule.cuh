// Which tasks of attention a block has, said once, for all roles.
#pragma once

#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

// How the context of a group of rows is split in this step. Divisions: not for every layer.
__device__ __forceinline__ plan::AttentionSplits splits_of_group(const StreamParams& p,
                                                                 const StreamShared& control,
                                                                 int index, int step) {
  const plan::RowGroup& group = control.groups[index];
  const int last = control.rows[group.first_row + group.rows - 1].position + step;
  return plan::attention_splits(last + 1, p.kv_block_positions, p.num_heads, p.head_dim,
                                static_cast<int>(gridDim.x));
}

// A group's tasks go to the blocks in turn, those of the next group to the blocks behind them; none
// has more tasks than there are blocks. Which one is this block's, where the groups before have
// `before` tasks in all; it may be behind the group's last.
__device__ __forceinline__ int task_of_block(int before) {
  const int blocks = static_cast<int>(gridDim.x);
  const int task = static_cast<int>(blockIdx.x) - before % blocks;
  return task < 0 ? task + blocks : task;
}

}  // namespace clusterfusion::cuda::stream
