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

// Sliding windows: window w reads tokens [begin_w, end_w) with begin_w = w stride, end_w =
// min(begin_w + context, total), until end_w = total. Its targets are the tokens from end_(w-1) on,
// which no window before it read, each given the tokens before it in the window.
//   each_token         A window whose first token is a target too (stride = context) also reads the
//                      token before it, which predicts it (the last token of a window is never fed,
//                      so no more than `context` are). So the text's first token alone is no
//                      target. mean_nll = sum over targets of -log p / number of targets.
//   transformers_docs  "Perplexity of fixed-length models" (transformers, perplexity.md), number
//                      for number: the first token of a window is no target;
//                      nll_w = mean over the targets of -log p,  weight_w = end_w - end_(w-1) - 1,
//                      mean_nll = sum(nll_w weight_w) / sum(weight_w). A window without a target
//                      (one token) is left out; the documentation's code would give NaN.
// perplexity = exp(mean_nll); scored_tokens is the number of targets, or sum(weight_w).
// Each window is computed from an empty KV cache. A progress callback that returns false ends the
// measure with the windows done so far.
PerplexityResult compute_perplexity(SharedBackend& backend, std::span<const TokenId> tokens,
                                    std::int64_t bytes, const PerplexityOptions& options);

}  // namespace clusterfusion
