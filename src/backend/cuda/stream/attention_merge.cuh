// What the shares of a task of attention have found, merged in their order.
#pragma once

#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/stream/attention_task.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"

namespace clusterfusion::cuda::stream {

// Query r of a task, whose shares' states are there: its output if there is one split, else a
// partial result for the combiners. By a team. `ablated`: the head is left out. `Place` knows where
// results go.
template <typename T, typename Place>
__device__ __forceinline__ void merge_shares(const Place& place, const AttentionTask& task,
                                             const TaskMemory<T>& memory, int r, bool ablated,
                                             const Team& team) {
  const StreamParams& p = place.p;
  const int stride = p.head_dim + 2;
  const float* states = memory.state(r, 0);
  float maximum = -INFINITY;
#pragma unroll
  for (int share = 0; share < plan::kConsumerWarps; ++share)
    maximum = fmaxf(maximum, states[share * stride]);
  float factor[plan::kConsumerWarps];
  // Of an ablated head infinity, so that value / total is zero. With several splits the combiners
  // write zeros and look at no partial result.
  float total = ablated ? INFINITY : 0.0f;
#pragma unroll
  for (int share = 0; share < plan::kConsumerWarps; ++share) {
    factor[share] = exp2f(states[share * stride] - maximum);
    total = fmaf(states[share * stride + 1], factor[share], total);
  }
  const int row = task.first_row + r;
  float* partial =
      place.template lamport<float>(p.layout.partials) +
      static_cast<std::int64_t>((row * p.num_heads + task.head) * p.max_splits + task.split) *
          stride;
  const int first = task.head * p.head_dim;
#pragma unroll 1
  for (int dim = team.thread; dim < p.head_dim; dim += team.threads) {
    float value = 0.0f;
#pragma unroll
    for (int share = 0; share < plan::kConsumerWarps; ++share)
      value = fmaf(states[share * stride + 2 + dim], factor[share], value);
    if (task.splits == 1)
      lamport_store(place.template attention_output<T>(row, first + dim),
                    static_cast<T>(value / total));
    else
      lamport_store(partial + 2 + dim, value);
  }
  if (task.splits > 1 && team.thread < 2)
    lamport_store(partial + team.thread, team.thread == 0 ? maximum : total);
}

}  // namespace clusterfusion::cuda::stream
