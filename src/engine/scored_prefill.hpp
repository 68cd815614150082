// Prefill that also tells how likely the tokens are that come next.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion {

// What to tell of each token.
struct ScoreDetail {
  std::int32_t num_top = 0;    // how many of the most likely tokens
  bool want_likeliest = true;  // whether ScoredToken::is_likeliest is wanted

  // The device alone tells log-probabilities; for the rest, logits come to the host.
  bool needs_logits() const noexcept { return num_top > 0 || want_likeliest; }
};

// The most tokens to prefill at once: the backend's piece, or fewer where logits of each are needed
// on the host (50304 float32 a token for Pythia).
std::int64_t scored_piece(const BackendInfo& info, const ScoreDetail& detail);

// Appends `tokens`, at most scored_piece(), to the sequence. targets[i] is the token that comes
// after tokens[i]; scores[i] is to tell of it; both may be shorter than `tokens`. `output` is what
// else the prefill is to give. Errors: those of Backend::prefill().
void prefill_scored(Backend& backend, std::int64_t vocab_size, SequenceId sequence,
                    std::span<const TokenId> tokens, std::span<const TokenId> targets,
                    const ScoreDetail& detail, std::span<ScoredToken> scores,
                    PrefillOutput output = {});

}  // namespace clusterfusion
