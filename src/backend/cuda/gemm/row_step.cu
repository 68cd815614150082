#include "backend/cuda/check.hpp"
#include "backend/cuda/dependent_launch.hpp"
#include "backend/cuda/gemm/product_input.hpp"
#include "backend/cuda/gemm/row_step.hpp"
#include "backend/cuda/numeric/layer_norm.cuh"
#include "backend/cuda/numeric/pack.cuh"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/ptx/grid_dependency.cuh"
#include "backend/cuda/stream/choose_token.cuh"
#include "backend/cuda/with_type.cuh"

namespace clusterfusion::cuda {
namespace {

using namespace device;

// As in the streaming kernel kConsumerThreads share a row, pair by pair.
using plan::kConsumerThreads;

// Sums over the block, in order of the warps; `buffer` may be used again behind a barrier.
__device__ __forceinline__ float2 block_sum(float2 value, float2 (&buffer)[plan::kConsumerWarps]) {
  value.x = warp_sum(value.x);
  value.y = warp_sum(value.y);
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
  __syncthreads();
  float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int warp = 0; warp < plan::kConsumerWarps; ++warp) {
    total.x += buffer[warp].x;
    total.y += buffer[warp].y;
  }
  return total;
}

// What earlier kernels wrote is read from L2: with programmatic dependent launch no kernel begins
// with an empty L1.

// The residual stream of one row, as far as one thread has it: pairs of elements, the streaming
// kernel's. `kPairs`: at most.
template <typename T, int kPairs>
class ResidualRow {
 public:
  __device__ __forceinline__ ResidualRow(const StreamParams& params, const ResidualParams& residual)
      : p(params), r(residual), row(static_cast<int>(blockIdx.x)), pairs(params.hidden_size / 2) {}

  // What is there before anything else is.
  __device__ __forceinline__ void load_norms() {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        if (n < r.norm_count && holds(j)) {
          weight[n][j] = __ldg(static_cast<const std::uint32_t*>(r.norms[n].weight) + pair(j));
          bias[n][j] = __ldg(static_cast<const std::uint32_t*>(r.norms[n].bias) + pair(j));
        }
  }

  __device__ __forceinline__ void load() {
    if (r.tokens != nullptr) return embed();
    const float2* kept = residual();
    float2 pending[plan::kMaxResidualParts][kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (holds(j)) x[j] = __ldcg(kept + pair(j));
#pragma unroll
      for (int i = 0; i < plan::kMaxResidualParts; ++i) {
        pending[i][j] = make_float2(0.0f, 0.0f);
        if (holds(j) && r.first_pending + i < r.last_pending)
          pending[i][j] = __ldcg(of_part(r.first_pending + i) + pair(j));
      }
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int i = 0; i < plan::kMaxResidualParts; ++i) {
        sum.x += pending[i][j].x;
        sum.y += pending[i][j].y;
      }
      x[j].x += sum.x;
      x[j].y += sum.y;
    }
  }

  __device__ __forceinline__ void keep() const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (holds(j)) residual()[pair(j)] = x[j];
  }

  __device__ __forceinline__ void normalize(float2 (&sums)[2][plan::kConsumerWarps]) const {
    float mean = r.tokens == nullptr ? __ldcg(r.means + row) : 0.0f;
    const Moments m =
        find_moments(mean, p.inverse_hidden_size, p.layer_norm_eps, [&](float shift, int pass) {
          float2 own = make_float2(0.0f, 0.0f);
#pragma unroll
          for (int j = 0; j < kPairs; ++j)
            if (holds(j)) add_shifted(own, x[j], shift);
          return block_sum(own, sums[pass]);
        });
    if (threadIdx.x == 0) r.means[row] = mean;
#pragma unroll
    for (int n = 0; n < 2; ++n)
      if (n < r.norm_count) publish(m, weight[n], bias[n], r.norms[n].output);
  }

 private:
  __device__ __forceinline__ int pair(int j) const {
    return static_cast<int>(threadIdx.x) + kConsumerThreads * j;
  }
  __device__ __forceinline__ bool holds(int j) const { return pair(j) < pairs; }
  __device__ __forceinline__ float2* residual() const {
    return reinterpret_cast<float2*>(r.residual) + static_cast<std::int64_t>(row) * pairs;
  }
  __device__ __forceinline__ const float2* of_part(int part) const {
    return reinterpret_cast<const float2*>(p.lamport + p.layout.residual) +
           (static_cast<std::int64_t>(part) * p.rows + row) * pairs;
  }
  __device__ __forceinline__ void embed() {
    // A token that was not chosen (a NaN among the logits) is reported by the host; stay in bounds.
    const std::int64_t token = max(__ldcg(r.tokens + row * r.token_stride), 0);
    const auto* from = static_cast<const std::uint32_t*>(p.embedding) + token * pairs;
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (holds(j)) x[j] = unpack<T>(__ldg(from + pair(j)));
    if (p.first_steering == nullptr) return;
    const auto* steering = reinterpret_cast<const float2*>(p.first_steering);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!holds(j)) continue;
      const float2 more = __ldg(steering + pair(j));
      x[j] = make_float2(x[j].x + more.x, x[j].y + more.y);
    }
  }
  __device__ __forceinline__ void publish(const Moments& m, const std::uint32_t (&weights)[kPairs],
                                          const std::uint32_t (&biases)[kPairs],
                                          std::int32_t output) const {
    auto* to = reinterpret_cast<std::uint32_t*>(p.lamport + output);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!holds(j)) continue;
      const float2 w = unpack<T>(weights[j]), b = unpack<T>(biases[j]);
      to[gemm::input_word(row, pair(j), gemm::input_lines(p.rows))] =
          pack<T>(normalized(x[j].x, m, w.x, b.x), normalized(x[j].y, m, w.y, b.y));
    }
  }

  const StreamParams& p;
  const ResidualParams& r;
  int row, pairs;
  float2 x[kPairs] = {};
  std::uint32_t weight[2][kPairs] = {}, bias[2][kPairs] = {};
};

template <typename T, int kPairs>
__global__ void __launch_bounds__(kConsumerThreads)
    residual_kernel(const __grid_constant__ StreamParams p,
                    const __grid_constant__ ResidualParams r) {
  __shared__ float2 sums[2][plan::kConsumerWarps];
  ResidualRow<T, kPairs> row(p, r);
  row.load_norms();
  wait_for_dependencies();
  start_dependents();  // not before: see attention_kernel.cuh
  row.load();
  row.keep();
  row.normalize(sums);
}

constexpr int kChoiceThreads = 1024;

__global__ void __launch_bounds__(kChoiceThreads)
    choice_kernel(const __grid_constant__ StreamParams p, const float* logits, std::int32_t step,
                  std::int32_t* chosen) {
  using stream::better;
  __shared__ Candidate of_warp[kChoiceThreads / 32];
  wait_for_dependencies();
  start_dependents();
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const StreamedRow& of_row = p.row_table[row];
  const float* of_logits = logits + static_cast<std::int64_t>(row) * p.logits_stride;
  Candidate best = stream::worst_candidate();
  for (int token = thread; token < p.vocab_size; token += kChoiceThreads) {
    const Candidate other =
        stream::candidate(of_row, of_row.position + step, token, __ldcg(of_logits + token));
    if (better(other, best)) best = other;
  }
  best = stream::best_of_lanes<32>(best);
  if (thread % 32 == 0) of_warp[thread / 32] = best;
  __syncthreads();
  if (thread >= 32) return;
  best = stream::best_of_lanes<32>(of_warp[thread]);
  if (thread == 0) chosen[row] = static_cast<std::int32_t>(best.token);  // kNoToken: -1
}

}  // namespace

void launch_residual(DType dtype, const StreamParams& params, const ResidualParams& residual,
                     cudaStream_t stream) {
  const DependentLaunch how(dim3(static_cast<unsigned>(params.rows)), dim3(kConsumerThreads), 0,
                            stream);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr std::int32_t kPairThreads = 2 * kConsumerThreads;
    static_assert(kMaxResidualSize == 12 * kPairThreads);
    const auto kernel =
        params.hidden_size <= 5 * kPairThreads ? residual_kernel<T, 5> : residual_kernel<T, 12>;
    check(cudaLaunchKernelEx(how.config(), kernel, params, residual),
          "starting the residual stream of many rows");
  });
}

void launch_choice(const StreamParams& params, const float* logits, std::int32_t step,
                   std::int32_t* chosen, cudaStream_t stream) {
  const DependentLaunch how(dim3(static_cast<unsigned>(params.rows)), dim3(kChoiceThreads), 0,
                            stream);
  check(cudaLaunchKernelEx(how.config(), choice_kernel, params, logits, step, chosen),
        "starting the choice of tokens");
}

}  // namespace clusterfusion::cuda
