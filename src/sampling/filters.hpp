// Which tokens may be drawn, and with which scores.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/sampling.hpp"

namespace clusterfusion {

struct Candidate {
  TokenId token = 0;
  float score = 0.0f;  // (logit - largest logit) / temperature, <= 0; the likeliest token has 0
  float logit = 0.0f;
};

// Divides the logits above 0 of the tokens seen by `penalty`, multiplies those below 0; a token
// counts once however often it was seen. Results stay finite; -inf stays -inf.
// logits, penalized: float32 [vocab]; tokens are ids below vocab.
void apply_repetition_penalty(std::span<const float> logits, std::span<const TokenId> tokens,
                              float penalty, std::span<float> penalized);

// The tokens that temperature (> 0), top-k, top-p and min-p leave, in no particular order; at least
// one. `logits` ([vocab], after the repetition penalty) hold neither NaN nor +inf, and `maximum`,
// their largest, is finite. The recipe, exactly:
//   top-k  keeps logits >= the k-th largest logit, and drops tokens with score -inf;
//   top-p  gives each token the weight exp(score) 2^40, rounded to an integer (weight.hpp), so that
//          sums do not depend on their order; tokens are taken by score, largest first, then by id,
//          lowest first, until the taken weight is >= top_p x total weight;
//   min-p  keeps scores >= log(min_p) (float64).
// score is computed in float32: one subtraction and one division.
std::vector<Candidate> filter_candidates(std::span<const float> logits, float maximum,
                                         const SamplingParams& params);

}  // namespace clusterfusion
