// The split combiner: one warp of each block that merges the splits of long contexts' attention,
// off the critical path. A lane waits for what the splits have of one element of one head's output,
// and writes it.
#pragma once

#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

// Element `index` of the row's attention output, from what `splits` splits have of it in Lamport
// set `set`.
__device__ __forceinline__ float combine_splits(const StreamParams& p, const char* set, int row,
                                                int index, int splits) {
  const int head = index / p.head_dim, dim = index % p.head_dim;
  const int stride = p.head_dim + 2;
  const float* partials =
      reinterpret_cast<const float*>(set + p.layout.partials) +
      static_cast<std::int64_t>(row * p.num_heads + head) * p.max_splits * stride;
  float maximum = -INFINITY;
  for (int split = 0; split < splits; ++split)
    maximum = fmaxf(maximum, lamport_wait(partials + split * stride));
  float total = 0.0f, value = 0.0f;
  constexpr int kBatch = 4;  // splits whose loads are under way
  for (int first = 0; first < splits; first += kBatch) {
    std::uint32_t bits[3][kBatch];
    bool missing = true;
    while (missing) {
      missing = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float* partial = partials + min(first + i, splits - 1) * stride;
        bits[0][i] = lamport_load(partial);
        bits[1][i] = lamport_load(partial + 1);
        bits[2][i] = lamport_load(partial + 2 + dim);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        missing |= bits[0][i] == kNotReady || bits[1][i] == kNotReady || bits[2][i] == kNotReady;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= splits) break;
      const float factor = exp2f(__uint_as_float(bits[0][i]) - maximum);
      total = fmaf(__uint_as_float(bits[1][i]), factor, total);
      value = fmaf(__uint_as_float(bits[2][i]), factor, value);
    }
  }
  return value / total;
}

template <typename T>
class Combiner {
 public:
  __device__ __forceinline__ Combiner(const StreamParams& params, StreamShared* shared)
      : p(params), control(shared), lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() const {
    const int warps_of_row = (p.num_heads * p.head_dim + 31) / 32;
    int epoch = 0;
    for (int step = 0; step < p.steps; ++step, ++epoch) {
      for (int layer = 0; layer < p.num_layers; ++layer, ++epoch) {
        int item = static_cast<int>(blockIdx.x);
        bool waited = false;
        for (int row = 0; row < p.rows; ++row, item -= warps_of_row) {
          if (item >= warps_of_row) continue;
          const int splits = splits_of(row, step);
          for (; item < warps_of_row; item += static_cast<int>(gridDim.x)) {
            if (splits == 1) continue;
            if (!waited) block_counter_wait(&control->cleared, epoch, kBackoffNanoseconds);
            waited = true;
            combine(lamport_set(p, epoch), layer, row, item * 32 + lane, splits);
          }
        }
      }
    }
  }

 private:
  __device__ __forceinline__ int splits_of(int row, int step) const {
    const int positions = control->rows[row].position + step + 1;
    return plan::attention_splits(positions, p.kv_block_positions, p.num_heads, p.head_dim,
                                  static_cast<int>(gridDim.x))
        .splits;
  }

  // Element `index` of the row's attention output, which may be behind the last.
  __device__ __forceinline__ void combine(char* set, int layer, int row, int index,
                                          int splits) const {
    if (index >= p.num_heads * p.head_dim) return;
    T* output = reinterpret_cast<T*>(set + p.layout.attention) + input_place(p, row, index);
    if (p.ablated.has_head(layer * p.num_heads + index / p.head_dim))
      return lamport_store(output, T(0.0f));
    lamport_store(output, static_cast<T>(combine_splits(p, set, row, index, splits)));
  }

  const StreamParams& p;
  StreamShared* control;
  int lane;
};

}  // namespace clusterfusion::cuda::stream
