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
        if (four[i].from != kNone) put(four[i], memory, loaded[i]);
    }
  }

 private:
  static constexpr int kBatch = 2;  // fours of a thread whose loads are under way

  enum class Kind { query, key, value };

  static constexpr int kNone = -1;
  // Four neighbouring elements of a vector: queries first, then the fresh rows' keys and values.
  struct Four {
    int from = kNone;  // in qkv_; kNone: there are none
    int angles = 0;    // in p.rotary, of the vector's position
    Kind kind = Kind::query;
    int row = 0, dim = 0;
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
    four.angles = position * (p.rotary_dim / 2);
    four.from = of_step * 3 * p.hidden_size +
                (task.head * 3 + static_cast<int>(four.kind)) * p.head_dim + four.dim;
    return four;
  }

  // Four elements, what rotation mixes each with, and its angle; the last two zero where nothing is
  // rotated.
  struct Loaded {
    uint4 value, other;
    float2 angle[4];
  };
  __device__ __forceinline__ Loaded load(const Four& four) const {
    Loaded loaded{};
    if (four.from == kNone) return loaded;
    loaded.value = lamport_load_4(qkv_ + four.from);
    loaded.other = {load_other(four, 0), load_other(four, 1), load_other(four, 2),
                    load_other(four, 3)};
    // Loaded together with what they rotate, so that it is one wait.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (is_rotated(four, i))
        loaded.angle[i] =
            __ldg(p.rotary + four.angles + four.dim + i - (is_low(four, i) ? 0 : p.rotary_dim / 2));
    return loaded;
  }
  __device__ __forceinline__ std::uint32_t load_other(const Four& four, int element) const {
    if (!is_rotated(four, element)) return 0;
    const int half = p.rotary_dim / 2;
    return lamport_load(qkv_ + four.from + element + (is_low(four, element) ? half : -half));
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
        rotated(four, 0, loaded.value.x, loaded.other.x, loaded.angle[0]),
        rotated(four, 1, loaded.value.y, loaded.other.y, loaded.angle[1]),
        rotated(four, 2, loaded.value.z, loaded.other.z, loaded.angle[2]),
        rotated(four, 3, loaded.value.w, loaded.other.w, loaded.angle[3]),
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
    memory.put_query(four.row, false, four.dim,
                     make_uint2(pack<T>(value[0], value[1]), pack<T>(value[2], value[3])));
    memory.put_query(four.row, true, four.dim,
                     make_uint2(pack<T>(rest[0], rest[1]), pack<T>(rest[2], rest[3])));
  }
  __device__ __forceinline__ float rotated(const Four& four, int element, std::uint32_t bits,
                                           std::uint32_t other_bits, const float2& angle) const {
    const float value = __uint_as_float(bits), other = __uint_as_float(other_bits);
    if (!is_rotated(four, element)) return value;
    return fmaf(value, angle.x, __fmul_rn(is_low(four, element) ? -other : other, angle.y));
  }

  const StreamParams& p;
  const float* qkv_;
  float inverse_fours_;
};

}  // namespace clusterfusion::cuda::stream
