#include "sampling/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <optional>

#include "base/fail.hpp"
#include "sampling/adjustments.hpp"
#include "sampling/filters.hpp"
#include "sampling/philox.hpp"

namespace clusterfusion {
namespace {

// The id of the largest score, the lowest on a tie; none may be NaN.
TokenId largest(std::span<const float> scores) {
  return static_cast<TokenId>(std::ranges::max_element(scores) - scores.begin());
}

// The id of the largest logit, the lowest on a tie.
TokenId argmax(std::span<const float> logits) {
  std::size_t best = 0;
  bool usable = true;
  for (std::size_t token = 0; token < logits.size(); ++token) {
    usable &= logits[token] <= std::numeric_limits<float>::max();  // false for NaN and +inf
    if (logits[token] > logits[best]) best = token;
  }
  if (usable && !std::isinf(logits[best])) return static_cast<TokenId>(best);

  for (std::size_t token = 0; token < logits.size(); ++token) {
    require(logits[token] <= std::numeric_limits<float>::max(), ErrorKind::non_finite,
            "the logit of token {} is {}, expected a finite number or -inf; check the weights for "
            "NaN and infinity",
            token, logits[token]);
  }
  fail(ErrorKind::non_finite,
       "all {} logits are -inf, expected at least one finite logit; check the weights for NaN and "
       "infinity",
       logits.size());
}

// Natural log of softmax(logits); the sum runs in float64, in the order of the ids.
class LogSoftmax {
 public:
  LogSoftmax(std::span<const float> logits, float maximum) : logits_(logits), maximum_(maximum) {
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - maximum);
    log_sum_ = std::log(sum);
  }
  float operator()(TokenId token) const {
    const double logit = logits_[static_cast<std::size_t>(token)];
    return static_cast<float>(logit - maximum_ - log_sum_);  // in this order: log_sum_ is small
  }

 private:
  std::span<const float> logits_;
  double maximum_;
  double log_sum_;
};

TokenId draw(const std::vector<Candidate>& candidates, const SamplingParams& params,
             std::uint64_t position) {
  std::optional<std::uint32_t> known_group;
  PhiloxCounter words{};
  TokenId best = std::numeric_limits<TokenId>::max();
  double best_score = -std::numeric_limits<double>::infinity();
  for (const Candidate& candidate : candidates) {
    const auto token = static_cast<std::uint32_t>(candidate.token);
    if (known_group != token / 4) {
      known_group = token / 4;
      words = noise_words(params.seed, position, token / 4);
    }
    const double score = noisy_score(candidate.logit, params.temperature, words[token % 4]);
    if (score > best_score || (score == best_score && candidate.token < best)) {
      best = candidate.token;
      best_score = score;
    }
  }
  return best;
}

std::vector<TokenLogprob> most_likely(std::span<const float> logits, const LogSoftmax& log_softmax,
                                      std::int32_t count) {
  if (count == 0) return {};
  std::vector<TokenId> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto end = ids.begin() + std::min<std::ptrdiff_t>(count, std::ssize(ids));
  std::partial_sort(ids.begin(), end, ids.end(), [logits](TokenId a, TokenId b) {
    const float logit_a = logits[static_cast<std::size_t>(a)];
    const float logit_b = logits[static_cast<std::size_t>(b)];
    return logit_a != logit_b ? logit_a > logit_b : a < b;
  });
  std::vector<TokenLogprob> top;
  std::transform(ids.begin(), end, std::back_inserter(top), [&](TokenId id) {
    return TokenLogprob{id, log_softmax(id)};
  });
  return top;
}

}  // namespace

Sampler::Sampler(const SamplingParams& params, std::int64_t vocab_size)
    : params_(params), vocab_size_(vocab_size), keeps_tokens_(needs_tokens(params)) {
  params_.validate();
  require(vocab_size >= 1 && vocab_size <= std::numeric_limits<TokenId>::max(),
          ErrorKind::invalid_argument, "vocab_size must be in [1, 2147483647], got {}", vocab_size);
  const auto check_id = [&](TokenId token, const char* what) {
    require(token >= 0 && token < vocab_size, ErrorKind::out_of_range,
            "{} names token {}, expected a token id in [0, {}) (the model's vocab_size)", what,
            token, vocab_size);
  };
  for (const TokenBias& biased : params_.logit_bias) check_id(biased.token, "logit_bias");
  for (const TokenId token : params_.suppressed_tokens) check_id(token, "suppressed_tokens");
  if (keeps_tokens_ || needs_host(params_)) {
    adjusted_logits_.resize(static_cast<std::size_t>(vocab_size));
  }
}

void Sampler::append(std::span<const TokenId> tokens) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    require(tokens[i] >= 0 && tokens[i] < vocab_size_, ErrorKind::out_of_range,
            "token {} at index {} is not in [0, {})", tokens[i], i, vocab_size_);
  }
  if (keeps_tokens_) tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  length_ += std::ssize(tokens);
}

void Sampler::truncate(std::int64_t length) {
  require(length >= 0 && length <= length_, ErrorKind::invalid_argument,
          "cannot truncate a sequence of {} tokens to {}", length_, length);
  if (keeps_tokens_) tokens_.resize(static_cast<std::size_t>(length));
  length_ = length;
}

std::span<const float> Sampler::scores_of(std::span<const float> logits) {
  std::span<const float> scores = logits;
  if (!adjusted_logits_.empty()) {
    adjust_logits(logits, tokens_, length_, params_, adjusted_logits_);
    scores = adjusted_logits_;
  }
  if (params_.drawable_vocab_size == 0) return scores;
  return scores.first(
      std::min(scores.size(), static_cast<std::size_t>(params_.drawable_vocab_size)));
}

SampledToken Sampler::sample(std::span<const float> logits) {
  require(std::ssize(logits) == vocab_size_, ErrorKind::invalid_argument,
          "expected {} logits (vocab_size), got {}", vocab_size_, logits.size());
  const float maximum = logits[static_cast<std::size_t>(argmax(logits))];
  const std::span<const float> scores = scores_of(logits);
  const TokenId likeliest = largest(scores);
  require(!std::isinf(scores[static_cast<std::size_t>(likeliest)]), ErrorKind::invalid_argument,
          "no token is left to choose at position {}: the request forbids every one (by "
          "no_repeat_ngram_size, min_new_tokens or allow_padded_ids); ask for less",
          length_);

  SampledToken sampled;
  sampled.token =
      params_.temperature == 0.0f
          ? likeliest
          : draw(filter_candidates(scores, scores[static_cast<std::size_t>(likeliest)], params_),
                 params_, static_cast<std::uint64_t>(length_));
  if (params_.num_logprobs >= 0) {
    const LogSoftmax log_softmax(logits, maximum);
    sampled.logprob = log_softmax(sampled.token);
    sampled.top = most_likely(logits, log_softmax, params_.num_logprobs);
  }
  return sampled;
}

TargetScore score_target(std::span<const float> logits, TokenId token) {
  require(token >= 0 && token < std::ssize(logits), ErrorKind::out_of_range,
          "token {} is not in [0, {})", token, logits.size());
  const TokenId likeliest = argmax(logits);
  return {LogSoftmax(logits, logits[static_cast<std::size_t>(likeliest)])(token),
          likeliest == token};
}

TokenId likeliest_token(std::span<const float> logits) { return argmax(logits); }

std::vector<TokenLogprob> likeliest_tokens(std::span<const float> logits, std::int32_t count) {
  if (count == 0) return {};
  const float maximum = logits[static_cast<std::size_t>(argmax(logits))];
  return most_likely(logits, LogSoftmax(logits, maximum), count);
}

}  // namespace clusterfusion
