// How the next token is chosen from the logits.
#pragma once

#include <cstdint>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

struct TokenBias {
  TokenId token = 0;
  float bias = 0.0f;
};

// The logits are adjusted in this order: logit_bias, repetition penalty, frequency and presence
// penalty, then what is forbidden. The filters apply in the order of transformers' generate():
// temperature, top-k, top-p, min-p. Then one token is drawn from the softmax over what is left, by
// the Gumbel-max rule: argmax over tokens i of logit_i / temperature + g_i, in float64, with
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

  // In [-2, 2], as the OpenAI API defines them: the logit of each token that stands n > 0 times in
  // the text so far, without the prompt, is lowered by n x frequency + presence.
  float frequency_penalty = 0.0f;
  float presence_penalty = 0.0f;
  // >= 0; no n tokens in a row (prompt and text) stand there twice, as transformers defines it; 0:
  // they may.
  std::int32_t no_repeat_ngram_size = 0;
  std::vector<TokenBias> logit_bias = {};  // each in [-100, 100], added to the token's logit

  // What an engine works out for its backend from a request; whatever a request says is replaced.
  std::int64_t drawable_vocab_size = 0;         // ids from here on are never drawn; 0: all may be
  std::int64_t num_prompt_tokens = 0;           // positions before it are the prompt's
  std::vector<TokenId> suppressed_tokens = {};  // never drawn for positions
  std::int64_t suppressed_until = 0;            // before this one

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
