// How the next token is chosen from the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// The filters apply in the order of transformers' generate(): repetition penalty, temperature,
// top-k, top-p, min-p. Then one token is drawn from the softmax over what is left, by the
// Gumbel-max rule: argmax over tokens i of logit_i / temperature + g_i, in float64, with
//   g_i = -log(-log(u_i)),  u_i from Philox4x32-10(key = seed, counter = (i / 4, position)).
// The noise of a token depends only on (seed, position, token): the same seed gives the same text
// for any number of threads, any batch and any backend.
struct SamplingParams {
  float temperature = 0.0f;  // >= 0; 0 is greedy: the largest score, the lowest id on a tie
  std::int32_t top_k = 0;    // >= 0; keep the k largest scores and ties with the last; 0: all
  float top_p = 1.0f;        // in (0, 1]; keep the fewest most likely tokens whose
                             // probabilities sum to top_p or more
  float min_p = 0.0f;        // in [0, 1]; drop tokens less likely than min_p x the likeliest
  float repetition_penalty = 1.0f;  // > 0; for each token of prompt and text so far: scores above 0
                                    // are divided by it, scores below 0 multiplied
  std::uint64_t seed = 0;
  std::int32_t num_logprobs = -1;  // -1: no log-probabilities; 0: of the chosen token;
                                   // n in 1..100: also of the n most likely tokens

  // Errors: invalid_argument, naming option, range and value.
  void validate() const;
};

struct TokenLogprob {
  TokenId token = 0;
  float logprob = 0.0f;  // natural log of the model's own probability, before any filter
};

struct SampledToken {
  TokenId token = -1;
  float logprob = 0.0f;           // valid if num_logprobs >= 0
  std::vector<TokenLogprob> top;  // the num_logprobs most likely, most likely first, ties by id
};

}  // namespace clusterfusion
