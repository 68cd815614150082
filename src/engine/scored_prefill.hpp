// Prefill that also tells how likely the tokens are that come next.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "clusterfusion/engine.hpp"

namespace clusterfusion {

// What to tell of each token.
struct ScoreDetail {
  std::int32_t num_top = 0;  // how many of the most likely tokens

  // The device tells log-probabilities and which targets are the likeliest; for the most likely
  // tokens logits come to the host.
  bool needs_logits() const noexcept { return num_top > 0; }
};

// The most tokens to prefill at once: the backend's piece, or fewer where logits of each are needed
// on the host (50304 float32 a token for Pythia).
std::int64_t scored_piece(const BackendInfo& info, const ScoreDetail& detail);

// A piece of a prompt, at most scored_piece(), whose prefill tells of the tokens that come next:
// targets[i] comes after tokens[i], and scores[i] is to tell of it; both may be shorter than
// `tokens`. All that is given outlives this.
class ScoredPiece {
 public:
  // `output` is what else the prefill is to give.
  ScoredPiece(std::int64_t vocab_size, SequenceId sequence, std::span<const TokenId> tokens,
              std::span<const TokenId> targets, const ScoreDetail& detail,
              std::span<ScoredToken> scores, PrefillOutput output = {});
  ScoredPiece(ScoredPiece&&) = default;
  ScoredPiece& operator=(ScoredPiece&&) = default;

  // For Backend::prefill() or prefill_together(). Its spans are this object's, also when it moves.
  const PrefillPart& part() const noexcept { return part_; }
  // Behind the prefill: fills in the scores.
  void collect() const;

 private:
  std::int64_t vocab_size_;
  std::span<const TokenId> targets_;
  ScoreDetail detail_;
  std::span<ScoredToken> scores_;
  std::vector<TokenId> all_targets_;
  std::vector<float> logprobs_;
  std::vector<std::uint8_t> is_likeliest_;
  std::vector<float> logits_;
  PrefillPart part_;
};

}  // namespace clusterfusion
