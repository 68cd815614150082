// Chooses the next token of one sequence, as clusterfusion/sampling.hpp defines it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/sampling.hpp"

namespace clusterfusion {

// Not thread-safe; one for each sequence. Remembers its tokens where the parameters need them.
class Sampler {
 public:
  // Errors: those of SamplingParams::validate(); invalid_argument for vocab_size < 1.
  Sampler(const SamplingParams& params, std::int64_t vocab_size);

  // Tokens that entered the sequence: the prompt's and the sampled ones.
  // Errors: out_of_range for an id outside the vocabulary.
  void append(std::span<const TokenId> tokens);
  // Forgets tokens from `length` on. Errors: invalid_argument if there are fewer than `length`.
  void truncate(std::int64_t length);
  // Tokens appended so far.
  std::int64_t length() const noexcept { return length_; }

  // The tokens so far, for what depends on them (the repetition penalty, ...); else empty.
  std::span<const TokenId> tokens() const noexcept { return tokens_; }

  // logits: float32 [vocab_size], left unchanged; -inf forbids a token. The position of the chosen
  // token (the RNG's counter) is length(). The token is not appended.
  // Errors: invalid_argument (size, or the parameters forbid every token), non_finite (NaN or +inf
  // among the logits, or all are -inf).
  SampledToken sample(std::span<const float> logits);

 private:
  // What the choice is made from: adjusted, and without the ids that are never drawn.
  std::span<const float> scores_of(std::span<const float> logits);

  SamplingParams params_;
  std::int64_t vocab_size_;
  std::int64_t length_ = 0;
  bool keeps_tokens_;
  std::vector<TokenId> tokens_;
  std::vector<float> adjusted_logits_;  // scratch, [vocab_size] if something adjusts them
};

// How likely a token is.
struct TargetScore {
  float logprob;      // natural log of softmax(logits)[token]; the sum in float64, in order of ids
  bool is_likeliest;  // whether it is likeliest_token()
};
// Errors: out_of_range (token), non_finite (NaN or +inf among the logits, or all are -inf).
TargetScore score_target(std::span<const float> logits, TokenId token);

// The id of the largest logit, the lowest on a tie. Errors: non_finite as above.
TokenId likeliest_token(std::span<const float> logits);

// The `count` (>= 0) most likely tokens or all, most likely first, ties by id, with their
// log-probabilities. Errors: non_finite as above.
std::vector<TokenLogprob> likeliest_tokens(std::span<const float> logits, std::int32_t count);

}  // namespace clusterfusion
