// Combines the splits of a head's attention, off the critical path: one warp of each
// block waits for the splits' partial results of 32 dimensions of a head and writes the head's
// output there.
#pragma once

#include "backend/cuda/decode/shared.cuh"
#include "backend/cuda/numeric/operand_order.cuh"

namespace clusterfusion::cuda {

template <typename T>
class SplitCombiner {
 public:
  __device__ __forceinline__ SplitCombiner(const DecodeParams& params, SharedControl* shared)
      : p(params), control(shared), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    constexpr unsigned kBackoff = kBackoffNanoseconds;
    int epoch = 0;
    for (int step = 0; step < p.steps; ++step, ++epoch) {
      const int splits = splits_at(p, p.first_position + step).splits;
      for (int layer = 0; layer < p.num_layers; ++layer, ++epoch) {
        if (splits == 1) continue;
        block_counter_wait(&control->cleared, epoch, kBackoff);
        combine(epoch, layer, splits, static_cast<int>(blockIdx.x));
      }
    }
  }

  // The share of block `number`, when the splits' results come.
  __device__ __forceinline__ void combine(int epoch, int layer, int splits, int number) const {
    const int parts = (p.head_dim + 31) / 32;
    for (int task = number; task < p.num_heads * parts; task += static_cast<int>(gridDim.x))
      combine(lamport_set(p, epoch), layer, task / parts, task % parts * 32 + lane, splits);
  }

 private:
  // Dimension `dim` of a head, which may be behind the last.
  __device__ __forceinline__ void combine(char* set, int layer, int head, int dim,
                                          int splits) const {
    // From one split of a head to the next; those of a group's heads lie side by side.
    const int stride = p.head_group * (p.head_dim + 2);
    const int kv_head = head / p.head_group, in_group = head % p.head_group;
    const float* partials = reinterpret_cast<const float*>(set + p.layout.partials) +
                            kv_head * splits * stride + in_group * (p.head_dim + 2);
    float maximum = -INFINITY, sum = 0.0f;
    if (lane < splits) {
      sum = lamport_wait(partials + lane * stride + 1);
      maximum = lamport_wait(partials + lane * stride);
    }
    const float factor = exp2f(maximum - warp_max(maximum));  // 0 in lanes without a split
    const float total = warp_sum(sum * factor);
    const float value =
        weighted_sum(partials + 2 + min(dim, p.head_dim - 1), stride, splits, factor);
    if (dim >= p.head_dim) return;
    T* output = reinterpret_cast<T*>(set + p.layout.attention);
    const float result = p.ablated.has_head(layer * p.num_heads + head) ? 0.0f : value / total;
    lamport_store(output + operand_order(head * p.head_dim + dim), static_cast<T>(result));
  }

  // The sum over splits of value[split * stride] times the factor that lane `split` holds.
  __device__ __forceinline__ static float weighted_sum(const float* value, int stride, int splits,
                                                       float factor) {
    constexpr int kBatch = 4;  // loads under way
    float result = 0.0f;
    for (int first = 0; first < splits; first += kBatch) {
      std::uint32_t bits[kBatch];
      bool missing = true;
      while (missing) {
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          bits[i] = first + i < splits ? lamport_load(value + (first + i) * stride) : 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= bits[i] == kNotReady;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        result = fmaf(__uint_as_float(bits[i]), __shfl_sync(kAllLanes, factor, first + i), result);
    }
    return result;
  }

  const DecodeParams& p;
  SharedControl* control;
  int lane;
};

}  // namespace clusterfusion::cuda
