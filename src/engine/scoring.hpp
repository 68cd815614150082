// Log-probabilities of given tokens: logits, score, perplexity.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/shared_backend.hpp"

namespace clusterfusion {

// These have the meaning and errors of their namesakes in Engine.
void compute_logits(SharedBackend& backend, std::span<const TokenId> tokens,
                    std::span<float> logits);
ScoreResult compute_score(SharedBackend& backend, std::span<const TokenId> tokens);
std::vector<ScoreResult> compute_scores(SharedBackend& backend,
                                        std::span<const std::vector<TokenId>> texts);
std::vector<LoglikelihoodResult> compute_loglikelihoods(
    SharedBackend& backend, std::span<const LoglikelihoodRequest> requests,
    const LoglikelihoodOptions& options);

// The sliding-window measure of "Perplexity of fixed-length models" in the Hugging Face
// documentation (transformers, perplexity.md), number for number:
//   window w reads tokens [begin_w, end_w) with begin_w = w stride, end_w = min(begin_w + context,
//   total), until end_w = total; its targets are the t_w = end_w - end_(w-1) tokens that no window
//   before it read, less the very first token of the window, which nothing predicts;
//   nll_w      = mean over the targets of -log p(token | the tokens before it in the window)
//   weight_w   = t_w - 1      (the documentation subtracts one for the shift of the labels)
//   mean_nll   = sum(nll_w weight_w) / sum(weight_w),  perplexity = exp(mean_nll)
// scored_tokens is sum(weight_w). bits_per_byte counts every target once:
//   sum over all targets of -log p / ln 2 / bytes.
// A window without a target (one token) is left out; the documentation's code would give NaN.
// Each window is computed from an empty KV cache. A progress callback that returns false ends the
// measure with the windows done so far.
PerplexityResult compute_perplexity(SharedBackend& backend, std::span<const TokenId> tokens,
                                    std::int64_t bytes, const PerplexityOptions& options);

}  // namespace clusterfusion
