#include "sampling/adjustments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling/filters.hpp"

namespace clusterfusion {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

// A sum that stays finite if the logit was.
void add(float& logit, float value) noexcept {
  if (std::isinf(logit)) return;
  constexpr float kLargest = std::numeric_limits<float>::max();
  logit = std::clamp(logit + value, -kLargest, kLargest);
}

void subtract_penalties(std::span<const TokenId> new_tokens, const SamplingParams& params,
                        std::span<float> logits) {
  std::vector<TokenId> sorted(new_tokens.begin(), new_tokens.end());
  std::ranges::sort(sorted);
  for (auto token = sorted.begin(); token != sorted.end();) {
    const auto end = std::upper_bound(token, sorted.end(), *token);
    const auto count = static_cast<float>(end - token);
    add(logits[static_cast<std::size_t>(*token)],
        -(count * params.frequency_penalty + params.presence_penalty));
    token = end;
  }
}

// NoRepeatNGramLogitsProcessor of transformers.
void forbid_repeated_ngrams(std::span<const TokenId> tokens, std::int32_t size,
                            std::span<float> logits) {
  const auto before = static_cast<std::size_t>(size) - 1;
  if (tokens.size() < before) return;
  const std::span<const TokenId> last = tokens.last(before);
  for (std::size_t at = 0; at + before < tokens.size(); ++at) {
    if (std::ranges::equal(tokens.subspan(at, before), last)) {
      logits[static_cast<std::size_t>(tokens[at + before])] = kForbidden;
    }
  }
}

}  // namespace

bool needs_tokens(const SamplingParams& params) noexcept {
  return params.repetition_penalty != 1.0f || params.frequency_penalty != 0.0f ||
         params.presence_penalty != 0.0f || params.no_repeat_ngram_size > 0;
}

bool needs_host(const SamplingParams& params) noexcept {
  return !params.logit_bias.empty() || params.frequency_penalty != 0.0f ||
         params.presence_penalty != 0.0f || params.no_repeat_ngram_size > 0 ||
         (params.suppressed_until > 0 && !params.suppressed_tokens.empty());
}

void adjust_logits(std::span<const float> logits, std::span<const TokenId> tokens,
                   std::int64_t length, const SamplingParams& params, std::span<float> adjusted) {
  std::ranges::copy(logits, adjusted.begin());
  for (const TokenBias& biased : params.logit_bias) {
    add(adjusted[static_cast<std::size_t>(biased.token)], biased.bias);
  }
  if (params.repetition_penalty != 1.0f) {
    std::vector<float> biased;
    if (!params.logit_bias.empty()) biased.assign(adjusted.begin(), adjusted.end());
    apply_repetition_penalty(biased.empty() ? logits : std::span<const float>(biased), tokens,
                             params.repetition_penalty, adjusted);
  }
  if (params.frequency_penalty != 0.0f || params.presence_penalty != 0.0f) {
    const auto prompt = std::min(static_cast<std::size_t>(params.num_prompt_tokens), tokens.size());
    subtract_penalties(tokens.subspan(prompt), params, adjusted);
  }
  if (params.no_repeat_ngram_size > 0) {
    forbid_repeated_ngrams(tokens, params.no_repeat_ngram_size, adjusted);
  }
  if (length < params.suppressed_until) {
    for (const TokenId token : params.suppressed_tokens) {
      adjusted[static_cast<std::size_t>(token)] = kForbidden;
    }
  }
}

}  // namespace clusterfusion
