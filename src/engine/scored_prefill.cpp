#include "engine/scored_prefill.hpp"

#include <algorithm>
#include <utility>

#include "sampling/sampler.hpp"

namespace clusterfusion {

std::int64_t scored_piece(const BackendInfo& info, const ScoreDetail& detail) {
  constexpr std::int64_t kMostLogitRows = 64;
  return detail.needs_logits() ? std::min(info.prefill_chunk, kMostLogitRows) : info.prefill_chunk;
}

ScoredPiece::ScoredPiece(std::int64_t vocab_size, SequenceId sequence,
                         std::span<const TokenId> tokens, std::span<const TokenId> targets,
                         const ScoreDetail& detail, std::span<ScoredToken> scores,
                         PrefillOutput output)
    : vocab_size_(vocab_size),
      targets_(targets),
      detail_(detail),
      scores_(scores),
      part_{sequence, tokens, std::move(output)} {
  constexpr TokenId kNoTarget = -1;
  if (targets.empty()) return;
  all_targets_.assign(tokens.size(), kNoTarget);
  std::ranges::copy(targets, all_targets_.begin());
  logprobs_.resize(tokens.size());
  is_likeliest_.resize(tokens.size());
  if (detail.needs_logits()) logits_.resize(tokens.size() * static_cast<std::size_t>(vocab_size));
  part_.output.targets = all_targets_;
  part_.output.target_logprobs = logprobs_;
  part_.output.target_is_likeliest = is_likeliest_;
  part_.output.all_logits = logits_;
}

void ScoredPiece::collect() const {
  const auto vocab = static_cast<std::size_t>(vocab_size_);
  for (std::size_t i = 0; i < targets_.size(); ++i) {
    scores_[i].token = targets_[i];
    scores_[i].logprob = logprobs_[i];
    scores_[i].is_likeliest = is_likeliest_[i] != 0;
    if (!detail_.needs_logits()) continue;
    const std::span row = std::span<const float>(logits_).subspan(i * vocab, vocab);
    scores_[i].top = likeliest_tokens(row, detail_.num_top);
  }
}

}  // namespace clusterfusion
