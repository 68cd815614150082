// Choosing a token on the device, by the rule of sampling/sampler.hpp.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clusterfusion/sampling.hpp"

namespace clusterfusion::cuda {

// SamplingParams allow no more.
inline constexpr std::int32_t kMaxLogprobs = 100;

// What one step gives. `token` comes first: the next step takes its input from there.
struct SampledStep {
  TokenId token;  // -1: NaN or +inf among the logits, or all that may be chosen are -inf
  float logprob;  // if num_logprobs >= 0
  TokenLogprob top[kMaxLogprobs];
};

struct SampleParams {
  const float* logits;  // float32 [vocab_size], 16-byte aligned, of the model; left as they are
  std::int32_t vocab_size;
  std::int32_t drawable_vocab_size;  // tokens from here on are not chosen; at most vocab_size
  float* scratch;       // float32 [vocab_size, rounded up to a multiple of 4], 16-byte aligned
  std::uint32_t* seen;  // bit t % 32 of word t / 32: token t is in the sequence; null: no penalty.
                        // The chosen token's is set.
  SampledStep* result;

  float repetition_penalty;
  float temperature;  // 0: greedy
  std::int32_t top_k;
  float top_p;
  double lowest_score;  // log(min_p), of the host; -inf for min_p 0
  std::uint64_t seed;
  std::uint64_t position;  // of the chosen token
  std::int32_t num_logprobs;
};

// Starts it on `stream`: one cluster of blocks. Token and kept set are those of the CPU's Sampler,
// bit for bit; the log-probabilities are summed in another order, so they agree to float32
// rounding.
void launch_sample(const SampleParams& params, cudaStream_t stream);

}  // namespace clusterfusion::cuda
