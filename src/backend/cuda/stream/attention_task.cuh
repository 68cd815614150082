// A task of attention: a split of one head's context for one group of rows, that is some rows of
// one sequence at consecutive positions, each of which sees its own past only.
//
// Positions are taken in groups of 16. Group n of the context belongs to share n % 8, and every
// share has an online softmax of its own; at the end the shares are merged in their order. So it
// does not matter which warp computes which share.
#pragma once

#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/stream/stream_params.hpp"

namespace clusterfusion::cuda::stream {

using namespace device;

struct AttentionTask {
  int head, split, splits;
  int first_row, rows;  // of the step: the queries
  int first_fresh;      // first row of the step that is of the same sequence
  int first_position;   // of row first_fresh
  int fresh_rows;       // whose keys and values are not in the cache yet; 0: the split has none
  // Of query r.
  __device__ __forceinline__ int position(int r) const {
    return first_position + (first_row - first_fresh) + r;
  }
  __device__ __forceinline__ int last_position() const { return position(rows - 1); }
};

// `position`: of the first row of the group's sequence in this step; `end`: the split has positions
// below it.
__device__ __forceinline__ AttentionTask make_task(const plan::RowGroup& group, int position,
                                                   int head, int split, int splits, int end) {
  const int fresh = end > position ? group.first_row + group.rows - group.sequence_first : 0;
  return {head, split, splits, group.first_row, group.rows, group.sequence_first, position, fresh};
}

// Threads that do something for a task together.
struct Team {
  int thread, threads;  // which of them this is, and how many there are
};

// What a task has in shared memory (plan::TaskLayout).
template <typename T>
class TaskMemory {
 public:
  __device__ __forceinline__ TaskMemory(char* memory, const StreamParams& p)
      : memory_(memory), p_(p) {}

  __device__ __forceinline__ char* queries() const { return memory_ + p_.task_layout.queries; }
  // Elements `dim` to dim + 3 of query r, or what rounding took from them; `dim` is a multiple
  // of 4. Queries of one quad lie one after the other, each with what rounding took behind it;
  // those of several as the products take them (AttentionShare), 16 bytes of two quads for each
  // lane.
  __device__ __forceinline__ void put_query(int r, bool is_rest, int dim,
                                            const uint2& words) const {
    auto* to = reinterpret_cast<std::uint32_t*>(queries());
    if (p_.task_queries <= plan::kQuadQueries) {
      to += (2 * r + is_rest) * (p_.head_dim / 2) + dim / 2;
      *reinterpret_cast<uint2*>(to) = words;
      return;
    }
    const int step = r / 8 * (p_.head_dim / 16) + dim / 16;
    const int lane = (2 * (r % 4) + is_rest) * 4 + dim % 16 / 4;
    to += (step * 32 + lane) * 4 + r / 4 % 2;
    to[0] = words.x;
    to[2] = words.y;
  }
  // The key of fresh row f, and head_dim behind it its value.
  __device__ __forceinline__ T* fresh(int f) const {
    return reinterpret_cast<T*>(memory_ + p_.task_layout.fresh) + f * 2 * p_.head_dim;
  }
  // What a share has found for query r: maximum, sum, and the output, not normalised.
  __device__ __forceinline__ float* state(int r, int share) const {
    return reinterpret_cast<float*>(memory_) +
           (r * plan::kConsumerWarps + share) * (p_.head_dim + 2);
  }

 private:
  char* memory_;
  const StreamParams& p_;
};

}  // namespace clusterfusion::cuda::stream
