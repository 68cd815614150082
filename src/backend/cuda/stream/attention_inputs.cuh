// What enters the products of a task of attention: queries, keys and values of the rows that the
// QKV matrix has just given, those rotated, scaled and rounded, in shared memory.
#pragma once

#include "backend/cuda/numeric/softmax.cuh"
#include "backend/cuda/stream/attention_task.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"

namespace clusterfusion::cuda::stream {

template <typename T>
class AttentionInputs {
 public:
  // `qkv`: float32 [rows, 3 hidden], a Lamport buffer.
  __device__ __forceinline__ AttentionInputs(const StreamParams& params, const float* qkv)
      : p(params), qkv_(qkv), inverse_head_dim_(1.0f / static_cast<float>(params.head_dim)) {}

  // By a team; a barrier is to lie behind it.
  __device__ __forceinline__ void prepare(const AttentionTask& task, const TaskMemory<T>& memory,
                                          const Team& team) const {
    const int count = (task.rows + 2 * task.fresh_rows()) * p.head_dim;
#pragma unroll 1
    for (int first = team.thread; first < count; first += kBatch * team.threads) {
      Input input[kBatch];
      std::uint32_t value[kBatch], other[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) input[i] = input_of(task, first + i * team.threads);
      bool missing = true;
      while (missing) {
        missing = false;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          value[i] = other[i] = 0;
          if (input[i].from != nullptr) value[i] = lamport_load(input[i].from);
          if (input[i].other != nullptr) other[i] = lamport_load(input[i].other);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) missing |= value[i] == kNotReady || other[i] == kNotReady;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (input[i].from != nullptr)
          put(input[i], memory, __uint_as_float(value[i]), __uint_as_float(other[i]));
    }
  }

 private:
  static constexpr int kBatch = 4;  // elements of a thread whose loads are under way

  // Element `index` of the task's inputs: queries first, then the fresh rows' keys and values.
  struct Input {
    const float* from = nullptr;   // null: there is none
    const float* other = nullptr;  // what rotation mixes it with; null: it is not rotated
    float sign = 0.0f;
    float2 angle;
    int kind = 0;  // 0 query, 1 key, 2 value
    int row = 0, dim = 0;
  };
  __device__ __forceinline__ Input input_of(const AttentionTask& task, int index) const {
    Input input;
    const int head_dim = p.head_dim;
    // index / head_dim: exact, as both are small.
    const int vector = static_cast<int>((static_cast<float>(index) + 0.5f) * inverse_head_dim_);
    if (vector >= task.rows + 2 * task.fresh_rows()) return input;
    input.dim = index - vector * head_dim;
    input.kind = vector < task.rows ? 0 : 1 + (vector - task.rows) % 2;
    input.row = vector < task.rows ? vector : (vector - task.rows) / 2;
    const int of_step = input.kind == 0 ? task.first_row + input.row : task.first_fresh + input.row;
    input.from = qkv_ + (static_cast<std::int64_t>(of_step) * 3 * p.hidden_size +
                         (task.head * 3 + input.kind) * head_dim + input.dim);
    if (input.kind < 2 && input.dim < p.rotary_dim) {
      const int half = p.rotary_dim / 2;
      const int position = task.first_position + (of_step - task.first_fresh);
      const bool is_low = input.dim < half;
      input.angle = __ldg(p.rotary + static_cast<std::int64_t>(position) * half +
                          (is_low ? input.dim : input.dim - half));
      input.other = is_low ? input.from + half : input.from - half;
      input.sign = is_low ? -1.0f : 1.0f;
    }
    return input;
  }

  __device__ __forceinline__ void put(const Input& input, const TaskMemory<T>& memory, float value,
                                      float other) const {
    if (input.other != nullptr)
      value = fmaf(value, input.angle.x, __fmul_rn(input.sign * other, input.angle.y));
    if (input.kind > 0) {
      memory.fresh(input.row)[(input.kind - 1) * p.head_dim + input.dim] = static_cast<T>(value);
      return;
    }
    // Scores come out as base-2 logarithms.
    value *= rsqrtf(static_cast<float>(p.head_dim)) * kLog2E;
    const float rounded = static_cast<float>(static_cast<T>(value));
    T* query = memory.query(input.row) + input.dim;
    query[0] = static_cast<T>(value);
    query[p.head_dim] = static_cast<T>(isinf(rounded) ? 0.0f : value - rounded);
  }

  const StreamParams& p;
  const float* qkv_;
  float inverse_head_dim_;
};

}  // namespace clusterfusion::cuda::stream
