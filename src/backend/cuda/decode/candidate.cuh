// Choosing a token: the largest logit, or by the Gumbel-max rule the largest logit / temperature +
// noise, with noise that depends on (seed, position, token) alone.
#pragma once

#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/numeric/reduce.cuh"
#include "backend/cuda/sync/lamport_buffer.cuh"
#include "sampling/philox.hpp"

namespace clusterfusion::cuda {

using namespace device;

// A logit that is not finite beats everything, as this token.
inline constexpr std::int64_t kNoToken = 0xffffffff;

__device__ __forceinline__ bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}
__device__ __forceinline__ Candidate worst_candidate() { return {-INFINITY, 0x7fffffff}; }

// `position`: of the input whose logits these are. `Options`: DecodeParams or StreamedRow.
template <typename Options>
__device__ __forceinline__ Candidate candidate(const Options& options, int position, int token,
                                               float logit) {
  if (!isfinite(logit)) return {INFINITY, kNoToken};
  if (token >= options.drawable_vocab_size) return worst_candidate();
  if (options.temperature == 0.0f) return {logit, token};
  const PhiloxCounter words = noise_words(options.seed, position + 1, token / 4);
  const std::uint32_t low = token % 2 == 0 ? words[0] : words[1];
  const std::uint32_t high = token % 2 == 0 ? words[2] : words[3];
  return {noisy_score(logit, options.temperature, token % 4 < 2 ? low : high), token};
}

// The best of groups of `kLanes` lanes, in each of them.
template <int kLanes>
__device__ __forceinline__ Candidate best_of_lanes(Candidate best) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const Candidate other{__shfl_xor_sync(kAllLanes, best.score, distance),
                          __shfl_xor_sync(kAllLanes, best.token, distance)};
    if (better(other, best)) best = other;
  }
  return best;
}

__device__ __forceinline__ void publish_candidate(std::uint64_t* slot, const Candidate& best) {
  lamport_store(slot, static_cast<std::uint64_t>(__double_as_longlong(best.score)));
  lamport_store(slot + 1, static_cast<std::uint64_t>(best.token));
}
__device__ __forceinline__ Candidate await_candidate(const std::uint64_t* slot) {
  const auto score = static_cast<long long>(lamport_wait(slot));
  return {__longlong_as_double(score), static_cast<std::int64_t>(lamport_wait(slot + 1))};
}

}  // namespace clusterfusion::cuda
