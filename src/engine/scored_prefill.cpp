#include "engine/scored_prefill.hpp"

#include <algorithm>
#include <vector>

#include "sampling/sampler.hpp"

namespace clusterfusion {

std::int64_t scored_piece(const BackendInfo& info, const ScoreDetail& detail) {
  constexpr std::int64_t kMostLogitRows = 64;
  return detail.needs_logits() ? std::min(info.prefill_chunk, kMostLogitRows) : info.prefill_chunk;
}

void prefill_scored(Backend& backend, std::int64_t vocab_size, SequenceId sequence,
                    std::span<const TokenId> tokens, std::span<const TokenId> targets,
                    const ScoreDetail& detail, std::span<ScoredToken> scores,
                    PrefillOutput output) {
  constexpr TokenId kNoTarget = -1;
  const auto vocab = static_cast<std::size_t>(vocab_size);
  std::vector<TokenId> all_targets(tokens.size(), kNoTarget);
  std::ranges::copy(targets, all_targets.begin());
  std::vector<float> logprobs(tokens.size());
  std::vector<float> logits;
  if (!targets.empty()) {
    if (detail.needs_logits()) logits.resize(tokens.size() * vocab);
    output.targets = all_targets;
    output.target_logprobs = logprobs;
    output.all_logits = logits;
  }
  backend.prefill(sequence, tokens, output);

  for (std::size_t i = 0; i < targets.size(); ++i) {
    scores[i].token = targets[i];
    scores[i].logprob = logprobs[i];
    if (!detail.needs_logits()) continue;
    const std::span row = std::span<const float>(logits).subspan(i * vocab, vocab);
    scores[i].is_likeliest = likeliest_token(row) == targets[i];
    scores[i].top = likeliest_tokens(row, detail.num_top);
  }
}

}  // namespace clusterfusion
