// One decoder layer with parallel residual, or a half of it, on the caller's own tensors: the
// machine of the streaming decode kernel (decode/decode_kernel.cuh) with another cache and other
// ends.
#pragma once

#include "backend/cuda/decode/decode_kernel.cuh"
#include "backend/cuda/device/tensor_copy.cuh"
#include "backend/cuda/ops/layer_params.hpp"

namespace clusterfusion::cuda {

// Keys and values in rows of all heads, as the callers keep them.
struct RowCache {
  const LayerParams& p;

  class Reader {
   public:
    __device__ __forceinline__ Reader(const RowCache& cache, int, int head, int, int)
        : p_(cache.p), column_(head * cache.p.stream.head_dim) {}
    __device__ __forceinline__ void copy(RingProducer& ring, int block) const {
      const DecodeParams& stream = p_.stream;
      const int row = block * stream.kv_block_positions;
      ring.copy_with(stream.kv_block_bytes, [&](std::uint32_t target, std::uint32_t barrier) {
        tensor_copy_to_shared(target, p_.key_map, column_, row, barrier);
        tensor_copy_to_shared(target + stream.kv_block_bytes / 2, p_.value_map, column_, row,
                              barrier);
      });
    }

   private:
    const LayerParams& p_;
    int column_;
  };

  __device__ __forceinline__ float2 angle(int, int dim) const {
    return make_float2(__ldg(p.cosines + dim), __ldg(p.sines + dim));
  }

  template <typename T>
  __device__ __forceinline__ void store(int, int head, int position, int dim, T key,
                                        T value) const {
    const int column = head * p.stream.head_dim + dim;
    const std::int64_t element =
        static_cast<std::int64_t>(position) * p.stream.hidden_size + column;
    static_cast<T*>(p.k_cache)[element] = key;
    static_cast<T*>(p.v_cache)[element] = value;
    static_cast<T*>(p.k_new)[column] = key;
    static_cast<T*>(p.v_new)[column] = value;
  }
};

class LayerProducer : public DecodeProducer<RowCache> {
 public:
  __device__ __forceinline__ LayerProducer(const LayerParams& params, const RowCache& kv_cache,
                                           SharedControl* shared, char* ring_data)
      : DecodeProducer(params.stream, kv_cache, shared, ring_data), layer(params) {}

  __device__ __forceinline__ void run(int epoch, int position) {
    counter += epoch * kLayerPhases;
    // One copy of the code for all phases: it must fit into few registers.
#pragma unroll 1
    for (int index = 0; index < 2; ++index) {
      plan::Phase phase = plan::layer_phase(true, index);
      if (index == 0 && !layer.attention_and_up) continue;
      if (index == 1 && layer.attention_and_up) stream_attention(0, epoch, position);
      if (index == 1 && !layer.down) phase = {Stream::attention_out};
      if (index == 1 && !layer.attention_and_up) phase = {Stream::mlp_down};
      stream(0, epoch, phase);
    }
    end();
  }
  __device__ __forceinline__ void end() { ring.announce(kRingEnd, {}); }

 private:
  const LayerParams& layer;
};

template <typename T, int kMaxIterations, int kMaxHeadSteps>
class LayerStep : public DecodeStep<T, kMaxIterations, kMaxHeadSteps, RowCache> {
  using Base = DecodeStep<T, kMaxIterations, kMaxHeadSteps, RowCache>;
  using Base::epoch, Base::next_id, Base::p, Base::ring, Base::thread, Base::x;
  using typename Base::Frag;
  using typename Base::LayerNorms;
  using typename Base::Moments;

 public:
  __device__ __forceinline__ LayerStep(const LayerParams& params, const RowCache& kv_cache,
                                       char* shared)
      : Base(params.stream, kv_cache, shared), layer(params) {}

  __device__ __forceinline__ void consume(int launch_epoch, int position) {
    epoch = launch_epoch;
    next_id = ring.announced();
    if (layer.attention_and_up) {
      first_half(position);
      if (layer.down) second_half();
    } else {
      down_only();
    }
  }

  // For a position that is not one: every result is NaN, the caches stay as they are.
  __device__ __forceinline__ void refuse() const {
    fill_nan(layer.attn_output, p.hidden_size);
    fill_nan(layer.mlp_intermediate, p.intermediate_size);
    fill_nan(layer.output, p.hidden_size);
    fill_nan(layer.k_new, p.hidden_size);
    fill_nan(layer.v_new, p.hidden_size);
  }

 private:
  __device__ __forceinline__ void fill_nan(void* vector, int count) const {
    if (vector == nullptr) return;
    for (int i = static_cast<int>(blockIdx.x) * kConsumerThreads + thread; i < count;
         i += static_cast<int>(gridDim.x) * kConsumerThreads)
      static_cast<T*>(vector)[i] = static_cast<T>(NAN);
  }

  __device__ __forceinline__ static const T* typed(const void* vector) {
    return static_cast<const T*>(vector);
  }

  // Attention's output goes to the caller, or to the second half; so do the MLP's activations.
  __device__ __forceinline__ void first_half(int position) {
    LayerNorms norms;
    this->load_norms(0, norms);
    load_input();
    const Moments moments = this->moments(false);
    this->normalise(moments, norms.input, 0);
    this->normalise(moments, norms.post, 1);
    this->consumer_barrier();
    Frag fragments;
    this->load_normed(p.qkv, 0, fragments);
    float* qkv = this->template flow<float>(p.layout.qkv);
    this->multiply(Stream::qkv, p.qkv, fragments, typed(layer.qkv_bias),
                   [&](int row, float value) { flow_store(qkv + row, value); });
    this->load_normed(p.mlp_up, 1, fragments);
    T* mlp = this->template flow<T>(p.layout.mlp);
    this->multiply(Stream::mlp_up, p.mlp_up, fragments, typed(layer.mlp_up_bias),
                   [&](int row, float value) {
                     const T rounded = static_cast<T>(activate(p.activation, value));
                     if (layer.down)
                       flow_store(mlp + operand_order(row), rounded);
                     else
                       static_cast<T*>(layer.mlp_intermediate)[row] = rounded;
                   });
    this->attend(0, position);
    if (layer.down) return;
    if (!this->comes(Stream::attention_out)) return;
    this->ask_activations(p.attention_out, p.layout.attention, fragments);
    this->wait_activations(p.attention_out, p.layout.attention, fragments);
    this->multiply(Stream::attention_out, p.attention_out, fragments,
                   typed(layer.attention_out_bias), [&](int row, float value) {
                     static_cast<T*>(layer.attn_output)[row] = static_cast<T>(value);
                   });
  }

  __device__ __forceinline__ void second_half() {
    Frag next;
    float* mlp = this->template flow<float>(p.layout.delta_mlp);
    float* attention = this->template flow<float>(p.layout.delta_attention);
    if (this->comes(Stream::mlp_down)) {
      Frag fragments;
      this->ask_activations(p.mlp_down, p.layout.mlp, fragments);
      this->wait_activations(p.mlp_down, p.layout.mlp, fragments);
      this->multiply(Stream::mlp_down, p.mlp_down, fragments, typed(layer.mlp_down_bias),
                     [&](int row, float value) { flow_store(mlp + row, value); });
    }
    if (this->comes(Stream::attention_out)) {
      this->ask_activations(p.attention_out, p.layout.attention, next);
      this->wait_activations(p.attention_out, p.layout.attention, next);
      this->multiply(Stream::attention_out, p.attention_out, next, typed(layer.attention_out_bias),
                     [&](int row, float value) { flow_store(attention + row, value); });
    }
    // The sum, each element by one thread, spread over all blocks.
    for (int i = static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) * thread;
         i < p.hidden_size; i += static_cast<int>(gridDim.x) * kConsumerThreads) {
      const float input = static_cast<float>(typed(layer.input)[i]);
      const float sum = input + flow_wait(attention + i) + flow_wait(mlp + i);
      static_cast<T*>(layer.output)[i] = static_cast<T>(sum);
    }
  }

  __device__ __forceinline__ void down_only() {
    if (!this->comes(Stream::mlp_down)) return;
    Frag fragments;
    load_plain(p.mlp_down, typed(layer.mlp_input), fragments);
    this->multiply(Stream::mlp_down, p.mlp_down, fragments, typed(layer.mlp_down_bias),
                   [&](int row, float value) {
                     const float sum = static_cast<float>(typed(layer.input)[row]) +
                                       static_cast<float>(typed(layer.attn_input)[row]) + value;
                     static_cast<T*>(layer.output)[row] = static_cast<T>(sum);
                   });
  }

  __device__ __forceinline__ void load_input() {
    const auto* row = static_cast<const std::uint32_t*>(layer.input);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      x[j] = make_float2(0.0f, 0.0f);
      if (this->holds(j)) x[j] = unpack<T>(__ldg(row + this->element(j) / 2));
    }
  }

  // Fragments of a vector that is not in operand order.
  __device__ __forceinline__ void load_plain(const StreamedMatrix& matrix, const T* vector,
                                             Frag& fragments) const {
    const T* first = vector + this->lane_column(matrix);
    const int swap = this->swap_columns(matrix);
#pragma unroll
    for (int i = 0; i < kMaxIterations; ++i) {
      uint4 words = make_uint4(0, 0, 0, 0);
      if (i < matrix.iterations)
        words = __ldg(reinterpret_cast<const uint4*>(first + i * 32 + (i % 2 == 0 ? swap : -swap)));
      fragments.value[i] = make_uint4(words.x, words.z, words.y, words.w);
    }
  }

  const LayerParams& layer;
};

// Empties the half of the scratch that the launch before has used.
__device__ __forceinline__ void sweep_layer(const LayerParams& p, int epoch, int lane) {
  char* set = flow_set(p.stream, epoch ^ 1);
  const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
  for (int offset = (static_cast<int>(blockIdx.x) * 32 + lane) * 16; offset < p.stream.layout.bytes;
       offset += static_cast<int>(gridDim.x) * 32 * 16)
    *reinterpret_cast<uint4*>(set + offset) = empty;
  if (blockIdx.x == 0 && lane < kLayerPhases)
    p.stream.tickets[(epoch ^ 1) * kLayerPhases + lane] = 0;
}

// The last block to end makes the scratch ready for the next launch.
__device__ __forceinline__ void end_launch(const LayerScratch& scratch, std::uint32_t launch) {
  if (atomicAdd(scratch.done, 1u) + 1 != gridDim.x) return;
  *scratch.done = 0;
  *scratch.launch = launch + 1;
}

template <typename T, int kMaxIterations, int kMaxHeadSteps>
__global__ void __launch_bounds__(kDecodeBlockThreads, 1)
    layer_kernel(const __grid_constant__ LayerParams params) {
  extern __shared__ __align__(128) char shared[];
  SharedControl* control = shared_control(shared);
  switch (threadIdx.x) {
    case 0: init_shared(params.stream, control); break;
    case 32: control->launch = *params.scratch.launch; break;
    case 64:
      control->position =
          params.device_position != nullptr ? *params.device_position : params.position;
      break;
  }
  __syncthreads();
  const std::uint32_t launch = control->launch;
  const int position = control->position;
  const int epoch = static_cast<int>(launch % 2);
  const bool valid = !params.attention_and_up || (position >= 0 && position < params.max_positions);
  const RowCache cache{params};
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < plan::kConsumerWarps) {
    take_registers<kConsumerRegisters>();
    LayerStep<T, kMaxIterations, kMaxHeadSteps> step(params, cache, shared);
    if (valid)
      step.consume(epoch, position);
    else
      step.refuse();
    if (threadIdx.x == 0) end_launch(params.scratch, launch);
    return;
  }
  give_up_registers<kProducerRegisters>();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  switch (warp - plan::kConsumerWarps) {
    case 0:
      if (lane == 0 && valid)
        LayerProducer(params, cache, control, shared_ring(params.stream, shared))
            .run(epoch, position);
      break;
    case 1: sweep_layer(params, epoch, lane); break;
    default:
      if (valid && params.attention_and_up) {
        const int splits = splits_at(params.stream, position).splits;
        if (splits > 1)
          SplitCombiner<T>(params.stream, control, warp - plan::kConsumerWarps - 2)
              .combine_heads(epoch, splits);
      }
  }
}

}  // namespace clusterfusion::cuda
