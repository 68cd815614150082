// What enters the products of a task of attention: queries, keys and values of the rows that the
// QKV matrix has just given, those rotated, scaled and rounded, in shared memory.
#pragma once

#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/stream/attention_task.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"

namespace clusterfusion::cuda::stream {

template <typename T>
class AttentionInputs {
 public:
  // `qkv`: float32 [rows, 3 hidden], a Lamport buffer.
  __device__ __forceinline__ AttentionInputs(const StreamParams& params, const float* qkv)
      : p(params), qkv_(qkv), inverse_fours_(4.0f / static_cast<float>(params.head_dim)) {}

  // By a team; a barrier is to lie behind it.
  __device__ __forceinline__ void prepare(const AttentionTask& task, const TaskMemory<T>& memory,
                                          const Team& team) const {
    const int count = (task.rows + 2 * task.fresh_rows) * (p.head_dim / 4);
#pragma unroll 1
    for (int first = team.thread; first < count; first += kBatch * team.threads) {
      Four four[kBatch];
      Loaded loaded[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) four[i] = four_of(task, first + i * team.threads, count);
      bool missing = true;
      while (missing) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) loaded[i] = load(four[i]);
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          missing |= any_not_ready(loaded[i].value) || any_not_ready(loaded[i].other);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (four[i].from != nullptr) put(four[i], memory, loaded[i]);
    }
  }

 private:
  static constexpr int kBatch = 2;  // fours of a thread whose loads are under way

  enum class Kind { query, key, value };

  // Four neighbouring elements of a vector: queries first, then the fresh rows' keys and values.
  struct Four {
    const float* from = nullptr;  // null: there is none
    Kind kind = Kind::query;
    int row = 0, dim = 0;
    float2 angle[4];  // where the elements are rotated
  };
  __device__ __forceinline__ Four four_of(const AttentionTask& task, int index, int count) const {
    Four four;
    if (index >= count) return four;
    // index / (head_dim / 4): exact, as both are small.
    const int vector = static_cast<int>((static_cast<float>(index) + 0.5f) * inverse_fours_);
    four.dim = 4 * index - vector * p.head_dim;
    const int fresh = vector - task.rows;  // keys and values in turn
    four.kind = fresh < 0 ? Kind::query : fresh % 2 == 0 ? Kind::key : Kind::value;
    four.row = fresh < 0 ? vector : fresh / 2;
    const int of_step = fresh < 0 ? task.first_row + four.row : task.first_fresh + four.row;
    const int position = task.first_position + (of_step - task.first_fresh);
    const int half = p.rotary_dim / 2;
    const float2* angles = p.rotary + static_cast<std::int64_t>(position) * half;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (is_rotated(four, i))
        four.angle[i] = __ldg(angles + four.dim + i - (is_low(four, i) ? 0 : half));
    four.from = qkv_ + (static_cast<std::int64_t>(of_step) * 3 * p.hidden_size +
                        (task.head * 3 + static_cast<int>(four.kind)) * p.head_dim + four.dim);
    return four;
  }

  // What rotation mixes each element with, zero where it is not rotated.
  struct Loaded {
    uint4 value, other;
  };
  __device__ __forceinline__ Loaded load(const Four& four) const {
    Loaded loaded{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
    if (four.from == nullptr) return loaded;
    loaded.value = lamport_load_4(four.from);
    loaded.other.x = load_other<0>(four);
    loaded.other.y = load_other<1>(four);
    loaded.other.z = load_other<2>(four);
    loaded.other.w = load_other<3>(four);
    return loaded;
  }
  template <int kElement>
  __device__ __forceinline__ std::uint32_t load_other(const Four& four) const {
    if (!is_rotated(four, kElement)) return 0;
    const int half = p.rotary_dim / 2;
    return lamport_load(four.from + kElement + (is_low(four, kElement) ? half : -half));
  }
  __device__ __forceinline__ bool is_rotated(const Four& four, int element) const {
    return four.kind != Kind::value && four.dim + element < p.rotary_dim;
  }
  // Of the two elements that rotation mixes, the first.
  __device__ __forceinline__ bool is_low(const Four& four, int element) const {
    return four.dim + element < p.rotary_dim / 2;
  }

  __device__ __forceinline__ void put(const Four& four, const TaskMemory<T>& memory,
                                      const Loaded& loaded) const {
    float value[4] = {
        rotated(four, 0, loaded.value.x, loaded.other.x),
        rotated(four, 1, loaded.value.y, loaded.other.y),
        rotated(four, 2, loaded.value.z, loaded.other.z),
        rotated(four, 3, loaded.value.w, loaded.other.w),
    };
    if (four.kind != Kind::query) {
      T* to = memory.fresh(four.row) + (four.kind == Kind::value ? p.head_dim : 0) + four.dim;
      *reinterpret_cast<uint2*>(to) =
          make_uint2(pack<T>(value[0], value[1]), pack<T>(value[2], value[3]));
      return;
    }
    // Scores come out as base-2 logarithms.
    const float scale = rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
    float rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] *= scale;
      const float rounded = static_cast<float>(static_cast<T>(value[i]));
      rest[i] = isinf(rounded) ? 0.0f : value[i] - rounded;
    }
    T* to = memory.query(four.row) + four.dim;
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack<T>(value[0], value[1]), pack<T>(value[2], value[3]));
    *reinterpret_cast<uint2*>(to + p.head_dim) =
        make_uint2(pack<T>(rest[0], rest[1]), pack<T>(rest[2], rest[3]));
  }
  __device__ __forceinline__ float rotated(const Four& four, int element, std::uint32_t bits,
                                           std::uint32_t other_bits) const {
    const float value = __uint_as_float(bits), other = __uint_as_float(other_bits);
    if (!is_rotated(four, element)) return value;
    const float2 angle = four.angle[element];
    return fmaf(value, angle.x, __fmul_rn(is_low(four, element) ? -other : other, angle.y));
  }

  const StreamParams& p;
  const float* qkv_;
  float inverse_fours_;
};

}  // namespace clusterfusion::cuda::stream
