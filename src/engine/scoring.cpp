#include "engine/scoring.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>
#include <numeric>

#include "base/fail.hpp"
#include "engine/prepare_request.hpp"
#include "engine/text_scorer.hpp"

namespace clusterfusion {
namespace {

constexpr TokenId kNoTarget = -1;
constexpr std::int32_t kMostAlternatives = 100;

// Prefills `tokens` in the backend's pieces; `output_of(begin, count)` says what each is to give.
template <typename OutputOf>
void prefill_in_pieces(SharedBackend& backend, const SequenceHandle& sequence,
                       std::span<const TokenId> tokens, OutputOf output_of) {
  const auto chunk = static_cast<std::size_t>(backend.info().prefill_chunk);
  for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const std::size_t count = std::min(chunk, tokens.size() - begin);
    const PrefillOutput output = output_of(begin, count);
    backend.run([&](Backend& device) {
      device.prefill(sequence.id(), tokens.subspan(begin, count), output);
    });
  }
}

// logprobs[i] of tokens[i + 1] after tokens[0..i] for i >= first_scored; 0 before.
std::vector<float> next_token_logprobs(SharedBackend& backend, const SequenceHandle& sequence,
                                       std::span<const TokenId> tokens, std::size_t first_scored) {
  std::vector<TokenId> targets(tokens.begin() + 1, tokens.end());
  std::fill_n(targets.begin(), first_scored, kNoTarget);
  std::vector<float> logprobs(targets.size());
  prefill_in_pieces(backend, sequence, tokens.first(targets.size()),
                    [&](std::size_t begin, std::size_t count) {
                      PrefillOutput output;
                      output.targets = std::span(targets).subspan(begin, count);
                      output.target_logprobs = std::span(logprobs).subspan(begin, count);
                      return output;
                    });
  return logprobs;
}

void check_fits(std::int64_t length, const SharedBackend& backend, const char* advice) {
  require(length <= backend.info().max_positions, ErrorKind::invalid_argument,
          "there are {} tokens, and the context holds {}; {}", length, backend.info().max_positions,
          advice);
}

// Fills in the defaults. Errors: invalid_argument.
PerplexityOptions check_options(PerplexityOptions options, std::int64_t max_positions) {
  if (options.context == 0) options.context = max_positions;
  require(options.context >= 2 && options.context <= max_positions, ErrorKind::invalid_argument,
          "context must be in [2, {}] (the engine's longest), or 0 for the longest, got {}",
          max_positions, options.context);
  const bool as_documented = options.method == PerplexityMethod::transformers_docs;
  // There a window counts with its new tokens less one, so that a stride of 1 would count the first
  // one only.
  const std::int64_t least = as_documented ? 2 : 1;
  if (options.stride == 0) options.stride = std::max(least, options.context / 2);
  require(options.stride >= least && options.stride <= options.context, ErrorKind::invalid_argument,
          "stride must be in [{}, {}] ({}the context), or 0 for half the context, got {}", least,
          options.context, as_documented ? "from 2, as transformers_docs weighs windows, to " : "",
          options.stride);
  return options;
}

// Tokens [begin, end) that are read, of which those from first_target on are scored.
struct Window {
  std::int64_t begin, first_target, end;
};

// The window that starts at `begin`, where the one before it ended at `previous_end`.
Window window_at(std::int64_t begin, std::int64_t previous_end, std::int64_t total,
                 const PerplexityOptions& options) {
  const std::int64_t end = std::min(begin + options.context, total);
  const bool predicts_first = options.method == PerplexityMethod::each_token;
  if (predicts_first && begin > 0 && begin == previous_end) --begin;
  return {begin, std::max(previous_end, begin + 1), end};
}

double sum_of(std::span<const float> values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// The last of `length` tokens is not fed.
void check_scored_length(std::int64_t length, const SharedBackend& backend) {
  const std::int64_t longest = backend.info().max_positions + 1;
  require(length <= longest, ErrorKind::invalid_argument,
          "there are {} tokens, and a context of {} positions scores at most {}; score a shorter "
          "text, or measure perplexity, which moves a window over long ones",
          length, longest - 1, longest);
}

void check_score(std::span<const TokenId> tokens, const SharedBackend& backend) {
  require(tokens.size() >= 2, ErrorKind::invalid_argument,
          "a score needs at least 2 tokens, because the first has nothing before it; got {}",
          tokens.size());
  check_tokens(tokens, backend.model().config().vocab_size, "tokens");
  check_scored_length(std::ssize(tokens), backend);
}

void check_pair(const LoglikelihoodRequest& request, const SharedBackend& backend) {
  require(!request.context.empty(), ErrorKind::invalid_argument,
          "the context has no tokens, and the first of a text has nothing before it; begin with "
          "the model's bos_token_id or eos_token_id");
  require(!request.continuation.empty(), ErrorKind::invalid_argument,
          "the continuation has no tokens; expected at least one to score");
  const std::int64_t vocab_size = backend.model().config().vocab_size;
  check_tokens(request.context, vocab_size, "context");
  check_tokens(request.continuation, vocab_size, "continuation");
  check_scored_length(std::ssize(request.context) + std::ssize(request.continuation), backend);
}

// An error tells which element of `list` it is about.
template <typename Check>
void check_numbered(const char* list, std::size_t index, Check check) {
  try {
    check();
  } catch (const Error& error) {
    fail(error.kind(), "{}[{}]: {}", list, index, error.what());
  }
}

ScoreResult score_result(std::span<const TokenId> tokens, std::span<const ScoredToken> scores) {
  ScoreResult result;
  result.tokens.assign(tokens.begin(), tokens.end());
  for (const ScoredToken& score : scores) result.logprobs.push_back(score.logprob);
  result.total = sum_of(result.logprobs);
  return result;
}

LoglikelihoodResult loglikelihood_result(std::vector<ScoredToken> scores) {
  LoglikelihoodResult result;
  for (const ScoredToken& token : scores) result.total += token.logprob;
  result.is_greedy = std::ranges::all_of(scores, &ScoredToken::is_likeliest);
  result.tokens = std::move(scores);
  return result;
}

}  // namespace

void compute_logits(SharedBackend& backend, std::span<const TokenId> tokens,
                    std::span<float> logits) {
  const std::int64_t vocab_size = backend.model().config().vocab_size;
  require(!tokens.empty(), ErrorKind::invalid_argument, "logits need at least 1 token, got none");
  check_tokens(tokens, vocab_size, "tokens");
  check_fits(std::ssize(tokens), backend, "pass fewer at a time");
  require(std::ssize(logits) == std::ssize(tokens) * vocab_size, ErrorKind::invalid_argument,
          "logits must have room for {} x {} (tokens x vocab_size) values, got {}", tokens.size(),
          vocab_size, logits.size());
  const SequenceHandle sequence(backend, {}, std::ssize(tokens));
  prefill_in_pieces(backend, sequence, tokens, [&](std::size_t begin, std::size_t count) {
    const auto width = static_cast<std::size_t>(vocab_size);
    PrefillOutput output;
    output.all_logits = logits.subspan(begin * width, count * width);
    return output;
  });
}

ScoreResult compute_score(SharedBackend& backend, std::span<const TokenId> tokens) {
  check_score(tokens, backend);
  const TextToScore text{{tokens.begin(), tokens.end()}, 1};
  return score_result(tokens, TextScorer(backend, {}).score({&text, 1}).front());
}

std::vector<ScoreResult> compute_scores(SharedBackend& backend,
                                        std::span<const std::vector<TokenId>> texts) {
  std::vector<TextToScore> to_score;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    check_numbered("texts", i, [&] { check_score(texts[i], backend); });
    to_score.push_back({texts[i], 1});
  }
  const auto scores = TextScorer(backend, {}).score(to_score);
  std::vector<ScoreResult> results;
  for (std::size_t i = 0; i < texts.size(); ++i) {
    results.push_back(score_result(texts[i], scores[i]));
  }
  return results;
}

std::vector<LoglikelihoodResult> compute_loglikelihoods(
    SharedBackend& backend, std::span<const LoglikelihoodRequest> requests,
    const LoglikelihoodOptions& options) {
  require(options.num_top >= 0 && options.num_top <= kMostAlternatives, ErrorKind::invalid_argument,
          "num_top must be in [0, {}], got {}", kMostAlternatives, options.num_top);
  std::vector<TextToScore> texts;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    check_numbered("requests", i, [&] { check_pair(requests[i], backend); });
    TextToScore text{requests[i].context, requests[i].context.size()};
    text.tokens.insert(text.tokens.end(), requests[i].continuation.begin(),
                       requests[i].continuation.end());
    texts.push_back(std::move(text));
  }
  std::vector<LoglikelihoodResult> results;
  for (std::vector<ScoredToken>& scores :
       TextScorer(backend, {.num_top = options.num_top}).score(texts, options.progress)) {
    results.push_back(loglikelihood_result(std::move(scores)));
  }
  return results;
}

PerplexityResult compute_perplexity(SharedBackend& backend, std::span<const TokenId> tokens,
                                    std::int64_t bytes, const PerplexityOptions& options) {
  const auto started = std::chrono::steady_clock::now();
  const std::int64_t total = std::ssize(tokens);
  require(total >= 2, ErrorKind::invalid_argument,
          "perplexity needs at least 2 tokens, because the first has nothing before it; got {}",
          total);
  require(bytes >= 0, ErrorKind::invalid_argument, "bytes must be >= 0 (0: unknown), got {}",
          bytes);
  check_tokens(tokens, backend.model().config().vocab_size, "tokens");
  const PerplexityOptions checked = check_options(options, backend.info().max_positions);
  const bool as_documented = checked.method == PerplexityMethod::transformers_docs;

  const SequenceHandle sequence(backend, {}, std::min(checked.context, total));
  double weighted_nll = 0;
  PerplexityResult result{.total_tokens = total};
  std::int64_t previous_end = 0;
  for (std::int64_t begin = 0; previous_end < total; begin += checked.stride) {
    const Window window = window_at(begin, previous_end, total, checked);
    if (window.first_target < window.end) {
      backend.run([&](Backend& device) { device.truncate(sequence.id(), 0); });
      const double nll = -sum_of(next_token_logprobs(
          backend, sequence, tokens.subspan(window.begin, window.end - window.begin),
          window.first_target - window.begin - 1));
      const std::int64_t targets = window.end - window.first_target;
      const std::int64_t weight = as_documented ? window.end - previous_end - 1 : targets;
      weighted_nll += nll / static_cast<double>(targets) * static_cast<double>(weight);
      result.scored_tokens += weight;
    }
    previous_end = window.end;
    if (checked.progress && !checked.progress(window.end, total)) break;
  }

  result.mean_nll = weighted_nll / static_cast<double>(result.scored_tokens);
  result.perplexity = std::exp(result.mean_nll);
  if (bytes > 0 && !as_documented) {
    result.bits_per_byte = weighted_nll / std::numbers::ln2 / static_cast<double>(bytes);
  }
  result.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return result;
}

}  // namespace clusterfusion
