// What is done to the logits before temperature and the filters.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/sampling.hpp"

namespace clusterfusion {

// Whether a choice depends on the tokens so far, so that somebody must remember them.
bool needs_tokens(const SamplingParams& params) noexcept;

// Whether adjust_logits() does anything but the repetition penalty, which devices know too.
bool needs_host(const SamplingParams& params) noexcept;

// Writes to `adjusted` what the choice of the token at position tokens.size() (or `length`, where
// tokens are not needed) starts from, in this order:
//   logit_bias          adds the bias of each token that has one;
//   repetition_penalty  of each token so far (filters.hpp);
//   frequency_penalty, presence_penalty  subtract count x frequency + presence for each token with
//                       count > 0 among those from num_prompt_tokens on;
//   no_repeat_ngram_size n  forbids (-inf) each token that has followed the last n - 1 tokens
//   before; suppressed_tokens   are forbidden before position suppressed_until.
// logits, adjusted: float32 [vocab]; finite logits stay finite unless forbidden, -inf stays -inf.
void adjust_logits(std::span<const float> logits, std::span<const TokenId> tokens,
                   std::int64_t length, const SamplingParams& params, std::span<float> adjusted);

}  // namespace clusterfusion
