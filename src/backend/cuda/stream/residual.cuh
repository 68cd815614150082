// The residual stream of one row, which a block's consumer threads keep in memory of their own,
// each its elements. Before a phase that normalises, pending updates are added; the normalised
// vectors go to all blocks (or, where every block keeps the one row there is, into its shared
// memory).
#pragma once

#include "backend/cuda/numeric/layer_norm.cuh"
#include "backend/cuda/numeric/operand_order.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/stream/activations.cuh"
#include "backend/cuda/stream/choose_token.cuh"
#include "backend/cuda/stream/consumer.cuh"

namespace clusterfusion::cuda::stream {

// `kPairs`: pairs of elements that one thread holds, at most.
template <typename T, int kPairs>
class Residual {
 public:
  __device__ __forceinline__ explicit Residual(Consumer& consumer)
      : row(owned_row(consumer.p)), c(consumer) {}

  __device__ __forceinline__ bool holds_row() const { return row >= 0; }

  __device__ __forceinline__ void embed(int token) {
    mean_before = 0.0f;  // a token's bits must not depend on the one before
    // A token that was not chosen (a NaN among the logits) is reported by the host; stay in bounds.
    const auto* of_token = reinterpret_cast<const std::uint32_t*>(
        static_cast<const T*>(c.p.embedding) +
        static_cast<std::int64_t>(max(token, 0)) * c.p.hidden_size);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (holds(j)) kept()[from_first(j) / 2] = unpack<T>(__ldg(of_token + element(j) / 2));
    }
    if (c.p.first_steering != nullptr) steer();
  }

  // For all blocks, in front of a phase that normalises. `layer` may be behind the last.
  __device__ __forceinline__ void normalize(int layer, int phase) {
    c.make_indices_opaque();
    const bool begins_epoch = phase == 0 || layer == c.p.num_layers;
    if (!holds_row()) {
      if (!begins_epoch) return;
      c.barrier();
      c.begin_epoch();
      c.barrier();
      return;
    }
    Norms norms;
    load_norms(layer, phase, norms);
    Elements x;
    load(x);
    if (layer > 0 || !begins_epoch) {
      add_pending_updates(x, begins_epoch);
      keep(x);
    }
    c.mark(StreamPoint::residual);
    const Moments m = moments(x, begins_epoch);
    const bool both = c.p.parallel_residual && layer < c.p.num_layers;
    if (begins_epoch) publish(x, m, norms.input, c.p.layout.input_norm, 0);
    if (both) publish(x, m, norms.post, c.p.layout.post_norm, 1);
    if (!begins_epoch) publish(x, m, norms.post, c.p.layout.post_norm, 0);
    if (keeps_residual_everywhere(c.p)) c.barrier();
  }

  // The best of all reducers' candidates for this row.
  __device__ __forceinline__ int choose_token() {
    const std::uint64_t* candidates = candidates_of(c.p, c.epoch, row);
    Candidate best = worst_candidate();
    const int count = static_cast<int>(gridDim.x) * kReducerWarps;
    for (int i = c.thread; i < count; i += kConsumerThreads) {
      const Candidate other = await_candidate(candidates + 2 * i);
      if (better(other, best)) best = other;
    }
    best = best_of_lanes<32>(best);
    if (c.lane == 0) c.control->candidate[c.warp] = best;
    c.barrier();
    if (c.thread == 0) {
      for (int w = 1; w < plan::kConsumerWarps; ++w)
        if (better(c.control->candidate[w], best)) best = c.control->candidate[w];
      c.control->token = static_cast<int>(best.token);  // kNoToken: -1
    }
    c.barrier();
    return c.control->token;
  }

  const int row;

 private:
  __device__ __forceinline__ void steer() const {
    const auto* steering = reinterpret_cast<const float2*>(c.p.first_steering + element(0));
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!holds(j)) continue;
      float2& own = kept()[from_first(j) / 2];
      const float2 more = __ldg(steering + from_first(j) / 2);
      own = make_float2(own.x + more.x, own.y + more.y);
    }
  }

  // Pair j of this thread begins at this element.
  __device__ __forceinline__ int element(int j) const {
    return 2 * (c.thread + kConsumerThreads * j);
  }
  // From element(0) to element(j).
  __device__ __forceinline__ static constexpr int from_first(int j) {
    return 2 * kConsumerThreads * j;
  }
  __device__ __forceinline__ bool holds(int j) const { return element(j) < c.p.hidden_size; }

  // This thread's pairs.
  using Elements = float2[kPairs];
  // Where they stay, from the first on: registers are too few to keep them through everything.
  __device__ __forceinline__ float2* kept() const {
    return c.p.residual +
           (static_cast<std::int64_t>(blockIdx.x) * c.p.hidden_size + element(0)) / 2;
  }
  __device__ __forceinline__ void load(Elements& x) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      x[j] = make_float2(0.0f, 0.0f);
      if (holds(j)) x[j] = kept()[from_first(j) / 2];
    }
  }
  __device__ __forceinline__ void keep(const Elements& x) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (holds(j)) kept()[from_first(j) / 2] = x[j];
  }

  // LayerNorm parameters of this thread's elements, fetched before they are needed.
  struct Norm {
    std::uint32_t weight[kPairs] = {}, bias[kPairs] = {};
  };
  struct Norms {
    Norm input, post;
  };
  __device__ __forceinline__ void load_norm(const void* weight, const void* bias,
                                            Norm& norm) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!holds(j)) continue;
      norm.weight[j] = __ldg(static_cast<const std::uint32_t*>(weight) + element(j) / 2);
      norm.bias[j] = __ldg(static_cast<const std::uint32_t*>(bias) + element(j) / 2);
    }
  }
  __device__ __forceinline__ void load_norms(int layer, int phase, Norms& norms) const {
    const StreamedLayer& first = c.p.first_layer;
    if (layer == c.p.num_layers)
      return load_norm(c.p.final_norm_weight, c.p.final_norm_bias, norms.input);
    if (phase == 0)
      load_norm(of_layer(c.p, first.input_norm_weight, layer),
                of_layer(c.p, first.input_norm_bias, layer), norms.input);
    if (phase > 0 || c.p.parallel_residual)
      load_norm(of_layer(c.p, first.post_norm_weight, layer),
                of_layer(c.p, first.post_norm_bias, layer), norms.post);
  }

  // x += the parts of the products behind the last LayerNorm, in order.
  __device__ __forceinline__ void add_pending_updates(Elements& x, bool begins_epoch) const {
    // Amid a layer with sequential residual it is attention's, of this epoch; else that of the
    // epoch before: the second MLP matrix's, and attention's where the residual is parallel.
    const int mlp_parts = mlp_vectors(c.p);
    const int begin = begins_epoch ? 0 : mlp_parts;
    const int end = !begins_epoch || c.p.parallel_residual ? mlp_parts + 1 : mlp_parts;
    const char* set = lamport_set(c.p, begins_epoch ? c.epoch - 1 : c.epoch);
    const auto* parts = reinterpret_cast<const float*>(set + c.p.layout.residual) +
                        static_cast<std::int64_t>(row) * c.p.hidden_size + element(0);
    const std::int64_t stride = static_cast<std::int64_t>(c.p.rows) * c.p.hidden_size;
    constexpr int kBatch = kPairs < 5 ? kPairs : 5;  // pairs whose loads are under way
    static_assert(kPairs % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kPairs; first += kBatch)
      add_batch<kBatch>(x, first, parts, stride, begin, end);
  }
  // What is not ready is greater than any other.
  template <int kParts, int kBatch>
  __device__ __forceinline__ static bool is_any_missing(const uint2 (&pending)[kParts][kBatch]) {
    std::uint32_t greatest = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        greatest = max(greatest, max(pending[part][i].x, pending[part][i].y));
    return greatest == kNotReady;
  }
  template <int kBatch>
  __device__ __forceinline__ void add_batch(Elements& x, int first, const float* parts,
                                            std::int64_t stride, int begin, int end) const {
    constexpr int kParts = plan::kMaxResidualParts;
    uint2 pending[kParts][kBatch];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        pending[part][i] = make_uint2(0, 0);
        if (begin + part < end && holds(first + i))
          pending[part][i] =
              lamport_load_2(parts + (begin + part) * stride + from_first(first + i));
      }
    while (__any_sync(kAllLanes, is_any_missing(pending)))
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (any_not_ready(pending[part][i]))
            pending[part][i] =
                lamport_load_2(parts + (begin + part) * stride + from_first(first + i));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        sum.x += __uint_as_float(pending[part][i].x);
        sum.y += __uint_as_float(pending[part][i].y);
      }
      x[first + i].x += sum.x;
      x[first + i].y += sum.y;
    }
  }

  // Sums over all elements; `which` of two buffers, so that a second one needs no barrier before.
  __device__ __forceinline__ float2 block_sum(float2 value, int which) const {
    value.x = warp_sum(value.x);
    value.y = warp_sum(value.y);
    if (c.lane == 0) c.control->reduce[which][c.warp] = value;
    c.barrier();
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < plan::kConsumerWarps; ++w) {
      total.x += c.control->reduce[which][w].x;
      total.y += c.control->reduce[which][w].y;
    }
    return total;
  }
  // Sums of x - shift and of its square.
  __device__ __forceinline__ float2 shifted_sums(const Elements& x, float shift, int which) const {
    float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (holds(j)) add_shifted(sums, x[j], shift);
    return block_sum(sums, which);
  }

  __device__ __forceinline__ Moments moments(const Elements& x, bool begins_epoch) {
    const Moments result = find_moments(mean_before, c.p.inverse_hidden_size, c.p.layer_norm_eps,
                                        [&](float shift, int pass) {
                                          const float2 sums = shifted_sums(x, shift, pass);
                                          if (pass == 0 && begins_epoch) c.begin_epoch();
                                          return sums;
                                        });
    // Behind it this epoch's Lamport set is clear, and the sums of before may be overwritten.
    c.barrier();
    return result;
  }

  // Normalised x, rounded: to its Lamport buffer, or as vector `slot` to shared memory.
  __device__ __forceinline__ void publish(const Elements& x, const Moments& m, const Norm& norm,
                                          std::int32_t offset, int slot) const {
    const bool stays = keeps_residual_everywhere(c.p);
    auto* local = reinterpret_cast<std::uint32_t*>(c.scratch + slot * c.p.hidden_size * 2);
    auto* global = c.template lamport<std::uint32_t>(offset);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const float2 weight = unpack<T>(norm.weight[j]);
      const float2 bias = unpack<T>(norm.bias[j]);
      const std::uint32_t rounded =
          pack<T>(normalized(x[j].x, m, weight.x, bias.x), normalized(x[j].y, m, weight.y, bias.y));
      if (!holds(j)) continue;
      if (stays)
        local[operand_order(element(j)) / 2] = rounded;
      else
        lamport_store_pair(global + input_place(c.p, row, element(j)) / 2, rounded);
    }
  }

  Consumer& c;
  float mean_before = 0.0f;  // of x, at the last LayerNorm
};

}  // namespace clusterfusion::cuda::stream
