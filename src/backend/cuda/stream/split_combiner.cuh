// The split combiners: warps of each block that merge the splits of long contexts' attention, off
// the critical path; one does nothing else, the other one is the buffer clearer's. A lane waits for
// what the splits have of two neighbouring elements of one head's output, and writes them.
#pragma once

#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/shared.cuh"

namespace clusterfusion::cuda::stream {

// What the splits of a head's attention have of two of its elements, in a Lamport buffer.
class Partials {
 public:
  static constexpr int kAtOnce = 4;  // splits whose loads are under way

  // Elements `index` and `index` + 1 of the row's attention output; `index` is even.
  __device__ __forceinline__ Partials(const StreamParams& p, const char* set, int row, int index,
                                      int splits)
      : stride_(p.head_dim + 2), splits_(splits) {
    const int head = index / p.head_dim;
    dim_ = index - head * p.head_dim;
    partials_ = reinterpret_cast<const float*>(set + p.layout.partials) +
                static_cast<std::int64_t>(row * p.num_heads + head) * p.max_splits * stride_;
  }

  // Merged in order of the splits.
  __device__ __forceinline__ float2 merge() {
    float maximum = -INFINITY;
    if (splits_ > kAtOnce)
      for (int first = 0; first < splits_; first += kAtOnce) {
        load<false>(first);
        maximum = greatest_of(maximum);
      }
    float total = 0.0f;
    float2 value = make_float2(0.0f, 0.0f);
    for (int first = 0; first < splits_; first += kAtOnce) {
      load<true>(first);
      if (splits_ <= kAtOnce) maximum = greatest_of(maximum);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= splits_) break;
        const float factor = exp2f(__uint_as_float(state_[i].x) - maximum);
        total = fmaf(__uint_as_float(state_[i].y), factor, total);
        value.x = fmaf(__uint_as_float(value_[i].x), factor, value.x);
        value.y = fmaf(__uint_as_float(value_[i].y), factor, value.y);
      }
    }
    return make_float2(value.x / total, value.y / total);
  }

 private:
  // Splits from `first` on, behind the last one the last again; when all are there. Maximum and sum
  // of each, and if asked for the two elements, not normalised.
  template <bool kWithValues>
  __device__ __forceinline__ void load(int first) {
    bool missing = true;
    while (missing) {
      // Keeps the compiler from holding all addresses in registers, of which there are few.
      asm volatile("" : "+r"(first));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const float* partial = partials_ + min(first + i, splits_ - 1) * stride_;
        state_[i] = lamport_load_2(partial);
        if constexpr (kWithValues) value_[i] = lamport_load_2(partial + 2 + dim_);
      }
      missing = false;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        missing |= any_not_ready(state_[i]);
        if constexpr (kWithValues) missing |= any_not_ready(value_[i]);
      }
    }
  }
  __device__ __forceinline__ float greatest_of(float maximum) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) maximum = fmaxf(maximum, __uint_as_float(state_[i].x));
    return maximum;
  }

  const float* partials_;
  int stride_, splits_, dim_;
  uint2 state_[kAtOnce], value_[kAtOnce];
};

template <typename T>
class Combiner {
 public:
  static constexpr int kWarps = 2;  // of a block

  // `number`: which of them this warp is.
  __device__ __forceinline__ Combiner(const StreamParams& params, StreamShared* shared, int number)
      : p(params), control(shared), number_(number), lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    for (int epoch = 0; epoch < p.steps * epochs_per_step(p); ++epoch) combine(epoch);
  }

  // The attention of an epoch; they are to be called one after the other.
  __device__ __forceinline__ void combine(int epoch) {
    if (layer_ == 0) {
      // Divisions: not for every layer.
      splits_ = lane < p.rows ? splits_of(lane, epoch / epochs_per_step(p)) : 1;
      is_needed_ = __any_sync(kAllLanes, splits_ > 1);
    }
    if (is_needed_ && layer_ < p.num_layers) combine_layer(lamport_set(p, epoch), epoch);
    layer_ = layer_ == p.num_layers ? 0 : layer_ + 1;
  }

 private:
  static constexpr int kItem = 64;  // elements of a row that a warp merges at once

  __device__ __forceinline__ int splits_of(int row, int step) const {
    const int positions = control->rows[row].position + step + 1;
    return plan::attention_splits(positions, p.kv_block_positions, p.num_heads, p.head_dim,
                                  static_cast<int>(gridDim.x))
        .splits;
  }

  // Items go to the warps of all blocks in turn.
  __device__ __forceinline__ void combine_layer(char* set, int epoch) const {
    const int items_of_row = (p.num_heads * p.head_dim + kItem - 1) / kItem;
    const int blocks = static_cast<int>(gridDim.x);
    int item = number_ * blocks + static_cast<int>(blockIdx.x);
    bool waited = false;
    for (int row = 0; row < p.rows; ++row, item -= items_of_row) {
      const int its_splits = __shfl_sync(kAllLanes, splits_, row);
      for (; item < items_of_row; item += kWarps * blocks) {
        if (its_splits == 1) continue;
        if (!waited) block_counter_wait(&control->cleared, epoch, kBackoffNanoseconds);
        waited = true;
        combine(set, row, item * kItem + 2 * lane, its_splits);
      }
    }
  }

  // Elements `index` and `index` + 1 of the row's attention output, which may be behind the last.
  __device__ __forceinline__ void combine(char* set, int row, int index, int splits) const {
    if (index >= p.num_heads * p.head_dim) return;
    T* output = reinterpret_cast<T*>(set + p.layout.attention) + input_place(p, row, index);
    const float2 value = p.ablated.has_head(layer_ * p.num_heads + index / p.head_dim)
                             ? make_float2(0.0f, 0.0f)
                             : Partials(p, set, row, index, splits).merge();
    lamport_store_pair(reinterpret_cast<std::uint32_t*>(output), pack<T>(value.x, value.y));
  }

  const StreamParams& p;
  StreamShared* control;
  int number_, lane;
  int layer_ = 0;  // whose attention comes next; num_layers: the LM head
  // Of this step: splits of row `lane`, and whether any row has several.
  int splits_ = 1;
  bool is_needed_ = false;
};

}  // namespace clusterfusion::cuda::stream
