#include "sampling/filters.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>

#include "sampling/token_score.hpp"
#include "sampling/weight.hpp"

namespace clusterfusion {
namespace {

bool more_likely(const Candidate& a, const Candidate& b) noexcept {
  return a.score != b.score ? a.score > b.score : a.token < b.token;
}

// The k-th largest logit; -inf if all are to be kept.
float top_k_threshold(std::span<const float> logits, std::int32_t top_k) {
  if (top_k == 0 || static_cast<std::size_t>(top_k) >= logits.size()) {
    return -std::numeric_limits<float>::infinity();
  }
  std::vector<float> values(logits.begin(), logits.end());
  const auto kth = values.begin() + (top_k - 1);
  std::nth_element(values.begin(), kth, values.end(), std::greater<>());
  return *kth;
}

void keep_top_p(std::vector<Candidate>& candidates, float top_p) {
  std::uint64_t total = 0;
  for (const Candidate& candidate : candidates) total += weight_of(candidate.score);

  // A few tokens usually suffice: sort a prefix that doubles until it does.
  std::uint64_t taken = 0;
  std::size_t sorted = 0;
  for (std::size_t prefix = 128; sorted < candidates.size(); prefix *= 2) {
    const std::size_t end = std::min(prefix, candidates.size());
    const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(sorted);
    const auto last = candidates.begin() + static_cast<std::ptrdiff_t>(end);
    if (last != candidates.end()) std::nth_element(first, last, candidates.end(), more_likely);
    std::sort(first, last, more_likely);
    for (; sorted < end; ++sorted) {
      taken += weight_of(candidates[sorted].score);
      if (reaches_top_p(taken, total, top_p)) {
        candidates.resize(sorted + 1);
        return;
      }
    }
  }
}

}  // namespace

void apply_repetition_penalty(std::span<const float> logits, std::span<const TokenId> tokens,
                              float penalty, std::span<float> penalized) {
  std::copy(logits.begin(), logits.end(), penalized.begin());
  for (const TokenId token : tokens) {
    const auto index = static_cast<std::size_t>(token);
    penalized[index] = penalized_logit(logits[index], penalty);
  }
}

std::vector<Candidate> filter_candidates(std::span<const float> logits, float maximum,
                                         const SamplingParams& params) {
  const float threshold = top_k_threshold(logits, params.top_k);
  std::vector<Candidate> candidates;
  candidates.reserve(params.top_k > 0 ? std::min<std::size_t>(params.top_k, logits.size())
                                      : logits.size());
  for (std::size_t token = 0; token < logits.size(); ++token) {
    if (logits[token] < threshold) continue;
    const float score = token_score(logits[token], maximum, params.temperature);
    if (std::isinf(score)) continue;
    candidates.push_back({static_cast<TokenId>(token), score, logits[token]});
  }
  if (params.top_p < 1.0f) keep_top_p(candidates, params.top_p);
  if (params.min_p > 0.0f) {
    const double lowest = std::log(static_cast<double>(params.min_p));
    std::erase_if(candidates, [lowest](const Candidate& c) { return c.score < lowest; });
  }
  return candidates;
}

}  // namespace clusterfusion
