// Choosing a token: the largest logit, or by the Gumbel-max rule the largest logit / temperature +
// noise; first in each block, then among the blocks.
#pragma once

#include "backend/cuda/decode/attention.cuh"
#include "sampling/philox.hpp"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias>
class DecodeChoice : public DecodeAttention<T, kMaxIterations, kMaxHeadSteps, Cache, Bias> {
  using Base = DecodeAttention<T, kMaxIterations, kMaxHeadSteps, Cache, Bias>;

 public:
  using Base::Base;

 protected:
  using Base::best, Base::consumer_barrier, Base::control, Base::lane, Base::p, Base::warp;

  __device__ __forceinline__ static bool better(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
  }

  // A logit that is not finite beats everything, as kNoToken.
  static constexpr std::int64_t kNoToken = 0xffffffff;
  __device__ __forceinline__ Candidate candidate(int token, float logit, int position) const {
    if (!isfinite(logit)) return {INFINITY, kNoToken};
    if (token >= p.drawable_vocab_size) return worst_candidate();
    if (p.temperature == 0.0f) return {logit, token};
    const PhiloxCounter words = noise_words(p.seed, position + 1, token / 4);
    const std::uint32_t low = token % 2 == 0 ? words[0] : words[1];
    const std::uint32_t high = token % 2 == 0 ? words[2] : words[3];
    return {noisy_score(logit, p.temperature, token % 4 < 2 ? low : high), token};
  }
  __device__ __forceinline__ static Candidate worst_candidate() { return {-INFINITY, 0x7fffffff}; }

  __device__ __forceinline__ Candidate best_of_warp(Candidate best) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const Candidate other{__shfl_xor_sync(kAllLanes, best.score, offset),
                            __shfl_xor_sync(kAllLanes, best.token, offset)};
      if (better(other, best)) best = other;
    }
    return best;
  }

  // All blocks' best candidates, as they come; for one warp.
  __device__ __forceinline__ Candidate best_of_blocks(const std::uint64_t* candidates) const {
    Candidate best = worst_candidate();
    for (int i = lane; i < static_cast<int>(gridDim.x); i += 32) {
      const auto score = static_cast<long long>(lamport_wait(candidates + 2 * i));
      const Candidate other{__longlong_as_double(score),
                            static_cast<std::int64_t>(lamport_wait(candidates + 2 * i + 1))};
      if (better(other, best)) best = other;
    }
    return best_of_warp(best);
  }

  // The best of all blocks' candidates; every block finds it for itself.
  __device__ __forceinline__ int choose_token() {
    best = best_of_warp(best);
    if (lane == 0) control->candidate[warp] = best;
    consumer_barrier();
    auto* candidates = this->template lamport<std::uint64_t>(p.layout.candidates);
    if (warp == 0) {
      if (lane == 0) {
        for (int w = 1; w < plan::kConsumerWarps; ++w)
          if (better(control->candidate[w], best)) best = control->candidate[w];
        auto* own = candidates + 2 * blockIdx.x;
        lamport_store(own, static_cast<std::uint64_t>(__double_as_longlong(best.score)));
        lamport_store(own + 1, static_cast<std::uint64_t>(best.token));
      }
      best = best_of_blocks(candidates);
      if (lane == 0) control->token = static_cast<int>(best.token);  // kNoToken: -1
    }
    consumer_barrier();
    return control->token;
  }
};

}  // namespace clusterfusion::cuda
