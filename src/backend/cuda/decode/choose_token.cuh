// Choosing a token among the candidates: first in each block, then among the blocks.
#pragma once

#include "backend/cuda/decode/attention.cuh"
#include "backend/cuda/decode/candidate.cuh"
#include "backend/cuda/decode/grouped_attention.cuh"

namespace clusterfusion::cuda {

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
using AttentionOf =
    std::conditional_t<kKind == plan::LayerKind::plain,
                       DecodeAttention<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>,
                       GroupedAttention<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>>;

template <typename T, int kMaxIterations, int kMaxHeadSteps, typename Cache, typename Bias,
          plan::LayerKind kKind>
class DecodeChoice : public AttentionOf<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind> {
  using Base = AttentionOf<T, kMaxIterations, kMaxHeadSteps, Cache, Bias, kKind>;

 public:
  using Base::Base;

 protected:
  using Base::best, Base::consumer_barrier, Base::control, Base::lane, Base::p, Base::warp;

  // All blocks' best candidates, as they come; for one warp.
  __device__ __forceinline__ Candidate best_of_blocks(const std::uint64_t* candidates) const {
    Candidate best = worst_candidate();
    for (int i = lane; i < static_cast<int>(gridDim.x); i += 32) {
      const Candidate other = await_candidate(candidates + 2 * i);
      if (better(other, best)) best = other;
    }
    return best_of_lanes<32>(best);
  }

  // The best of all blocks' candidates; every block finds it for itself.
  __device__ __forceinline__ int choose_token() {
    best = best_of_lanes<32>(best);
    if (lane == 0) control->candidate[warp] = best;
    consumer_barrier();
    auto* candidates = this->template lamport<std::uint64_t>(p.layout.candidates);
    if (warp == 0) {
      if (lane == 0) {
        for (int w = 1; w < plan::kConsumerWarps; ++w)
          if (better(control->candidate[w], best)) best = control->candidate[w];
        publish_candidate(candidates + 2 * blockIdx.x, best);
      }
      best = best_of_blocks(candidates);
      if (lane == 0) control->token = static_cast<int>(best.token);  // kNoToken: -1
    }
    consumer_barrier();
    return control->token;
  }
};

}  // namespace clusterfusion::cuda
