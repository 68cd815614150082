// The residual stream, which every block keeps whole in the registers of its consumer threads, and
// its LayerNorms.
#pragma once

#include "backend/cuda/decode/activations.cuh"
#include "backend/cuda/numeric/layer_norm.cuh"
#include "backend/cuda/numeric/operand_order.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeResidual
    : public DecodeActivations<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = DecodeActivations<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::begin_epoch, Base::consumer_barrier, Base::control, Base::kBatch, Base::lane,
      Base::mean_before, Base::normed, Base::norms, Base::p, Base::prefetch_chunks, Base::thread,
      Base::warp, Base::x;
  using typename Base::Norm;

  // This thread's pairs of a vector of hidden_size elements: pair j starts at element(j).
  __device__ __forceinline__ int element(int j) const {
    return 2 * (thread + kConsumerThreads * j);
  }
  __device__ __forceinline__ bool holds(int j) const { return element(j) < p.hidden_size; }

  __device__ __forceinline__ void embed(int token) {
    // A token that was not chosen (a NaN among the logits) is reported by the host; stay in bounds.
    const auto* row = reinterpret_cast<const std::uint32_t*>(
        static_cast<const T*>(p.embedding) +
        static_cast<std::int64_t>(max(token, 0)) * p.hidden_size);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      x[j] = make_float2(0.0f, 0.0f);
      if (holds(j)) x[j] = unpack<T>(__ldg(row + element(j) / 2));
    }
  }

  // Those of layer `index`, or the final one's behind the last layer. Of layers of any kind the
  // one that their part `part` begins with, as norms.input: there are registers for one.
  __device__ __forceinline__ void load_norms(int index, int part) {
    const StreamedLayer layer = layer_at(p, index);
    const bool is_final = index == p.num_layers;
    const void* weight = is_final ? p.final_norm_weight : layer.input_norm_weight;
    const void* bias = is_final ? p.final_norm_bias : layer.input_norm_bias;
    if (kKind == plan::LayerKind::any && part == 1) {
      weight = layer.post_norm_weight;
      bias = layer.post_norm_bias;
    }
    load_norm(weight, bias, norms.input);
    if constexpr (kKind == plan::LayerKind::plain)
      if (!is_final) load_norm(layer.post_norm_weight, layer.post_norm_bias, norms.post);
  }

  __device__ __forceinline__ bool has_rms_norm() const {
    if constexpr (kKind == plan::LayerKind::any) return p.rms_norm;
    return false;
  }

  __device__ __forceinline__ void load_norm(const void* weight, const void* bias,
                                            Norm& norm) const {
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      norm.weight[j] = norm.bias[j] = 0;
      if (!holds(j)) continue;
      norm.weight[j] = __ldg(static_cast<const std::uint32_t*>(weight) + element(j) / 2);
      if (!has_rms_norm())
        norm.bias[j] = __ldg(static_cast<const std::uint32_t*>(bias) + element(j) / 2);
    }
  }

  // Sums over all elements; `which` of two buffers, so that a second one needs no barrier before.
  __device__ __forceinline__ float2 block_sum(float2 value, int which) {
    value.x = warp_sum(value.x);
    value.y = warp_sum(value.y);
    if (lane == 0) control->reduce[which][warp] = value;
    consumer_barrier();
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < plan::kConsumerWarps; ++w) {
      total.x += control->reduce[which][w].x;
      total.y += control->reduce[which][w].y;
    }
    return total;
  }

  // Sums of x - shift and of its square.
  __device__ __forceinline__ float2 shifted_sums(float shift, int which) {
    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      const float first = holds(j) ? x[j].x - shift : 0.0f;
      const float second = holds(j) ? x[j].y - shift : 0.0f;
      sums.x += first + second;
      sums.y = fmaf(first, first, fmaf(second, second, sums.y));
    }
    return block_sum(sums, which);
  }

  struct Moments {
    float mean, inverse_deviation;
  };
  // Mean and deviation of x. One pass over x - shift, where the shift is the mean of the layer
  // before: exact to rounding as long as the mean has moved by no more than a few deviations.
  // Where it has moved further, a second pass with the mean just found.
  __device__ __forceinline__ Moments moments(bool first_of_epoch) {
    float2 sums = shifted_sums(mean_before, 0);
    if (first_of_epoch) begin_epoch();
    if (has_rms_norm())  // whose mean_before is zero for ever
      return {0.0f, rsqrtf(sums.y * p.inverse_hidden_size + p.layer_norm_eps)};
    float moved = sums.x * p.inverse_hidden_size;
    float variance = sums.y * p.inverse_hidden_size - moved * moved;
    float mean = mean_before + moved;
    if (!(moved * moved <= kFewDeviations * variance)) {
      sums = shifted_sums(mean, 1);
      moved = sums.x * p.inverse_hidden_size;
      variance = sums.y * p.inverse_hidden_size - moved * moved;
      mean += moved;
    }
    mean_before = mean;
    return {mean, rsqrtf(variance + p.layer_norm_eps)};
  }

  // Where the input of a layer's part lies among the normalised inputs: plan::normed_inputs.
  __device__ __forceinline__ int input_of_part(int part) const {
    return kKind == plan::LayerKind::any && !p.parallel_residual ? 0 : part;
  }

  // Writes normalised x, rounded, to one of the inputs in shared memory.
  __device__ __forceinline__ void normalise(const Moments& moments, const Norm& norm, int input) {
    auto* output = reinterpret_cast<std::uint32_t*>(normed + input * p.hidden_size) +
                   operand_order(element(0)) / 2;
#pragma unroll
    for (int j = 0; j < kMaxIterations; ++j) {
      const float2 weight = unpack<T>(norm.weight[j]);
      const float2 bias = unpack<T>(norm.bias[j]);
      const float first = (x[j].x - moments.mean) * moments.inverse_deviation;
      const float second = (x[j].y - moments.mean) * moments.inverse_deviation;
      const std::uint32_t rounded =
          pack<T>(fmaf(first, weight.x, bias.x), fmaf(second, weight.y, bias.y));
      if (holds(j)) output[kConsumerThreads * j] = rounded;  // in groups of eight elements
    }
  }

  // Adds pending residual updates: x += one or two Lamport buffers.
  __device__ __forceinline__ void add_pending_updates(const float* first, const float* second) {
    if constexpr (kKind == plan::LayerKind::plain) {
      add_buffers(first, second);
    } else {
      // One after the other: mostly there is one, and registers are fewer.
#pragma unroll 1
      for (const float* buffer = first; buffer != nullptr;
           buffer = buffer == second ? nullptr : second)
        add_buffers(buffer, nullptr);
    }
  }

  // Pairs of elements whose loads are under way together: where results cross often all of them.
  static constexpr int kUpdateBatch = kKind == plan::LayerKind::any ? kMaxIterations : kBatch;

  // Of all words: kNotReady, which is greater than any other, if one is not ready.
  __device__ __forceinline__ static std::uint32_t greatest(const uint2 (&delta)[kUpdateBatch],
                                                           const uint2 (&other)[kUpdateBatch]) {
    std::uint32_t result = 0;
#pragma unroll
    for (int i = 0; i < kUpdateBatch; ++i)
      result = max(result, max(max(delta[i].x, delta[i].y), max(other[i].x, other[i].y)));
    return result;
  }

  // All loads of a batch are issued first, and repeated only for missing elements: they share the
  // way from L2 with the weights.
  __device__ __forceinline__ void add_buffers(const float* first, const float* second) {
#pragma unroll
    for (int begin = 0; begin < kMaxIterations; begin += kUpdateBatch) {
      uint2 delta[kUpdateBatch], other[kUpdateBatch];
#pragma unroll
      for (int i = 0; i < kUpdateBatch; ++i) {
        delta[i] = other[i] = make_uint2(0, 0);
        if (!holds(begin + i)) continue;
        delta[i] = lamport_load_2(first + element(begin + i));
        if (second != nullptr) other[i] = lamport_load_2(second + element(begin + i));
      }
      prefetch_chunks();
      while (__any_sync(kAllLanes, greatest(delta, other) == kNotReady)) {
#pragma unroll
        for (int i = 0; i < kUpdateBatch; ++i) {
          if (any_not_ready(delta[i])) delta[i] = lamport_load_2(first + element(begin + i));
          if (any_not_ready(other[i])) other[i] = lamport_load_2(second + element(begin + i));
        }
        prefetch_chunks();
      }
#pragma unroll
      for (int i = 0; i < kUpdateBatch; ++i) {
        x[begin + i].x += __uint_as_float(delta[i].x) + __uint_as_float(other[i].x);
        x[begin + i].y += __uint_as_float(delta[i].y) + __uint_as_float(other[i].y);
      }
    }
  }
};

}  // namespace clusterfusion::cuda
