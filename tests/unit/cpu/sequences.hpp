// Ways to run a text through a backend, for tests.
#pragma once

#include <random>
#include <span>
#include <vector>

#include "backend/backend.hpp"

namespace clusterfusion::test {

inline std::vector<TokenId> random_tokens(const ModelConfig& config, std::size_t count,
                                          unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& t : tokens) t = static_cast<TokenId>(random() % config.vocab_size);
  return tokens;
}

// Logits at every position of `tokens`, appended to `sequence` in one prefill.
inline std::vector<float> prefill_logits(Backend& backend, const ModelConfig& config,
                                         SequenceId sequence, std::span<const TokenId> tokens) {
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(config.vocab_size));
  PrefillOutput output;
  output.all_logits = logits;
  backend.prefill(sequence, tokens, output);
  return logits;
}

// The same of a new sequence, which is released.
inline std::vector<float> all_logits(Backend& backend, const ModelConfig& config,
                                     std::span<const TokenId> tokens) {
  const SequenceId sequence = backend.create_sequence({});
  std::vector<float> logits = prefill_logits(backend, config, sequence, tokens);
  backend.release_sequence(sequence);
  return logits;
}

// Logits of one decode step of one sequence.
inline std::vector<float> decode_logits(Backend& backend, const ModelConfig& config,
                                        SequenceId sequence, TokenId token) {
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  backend.decode({&sequence, 1}, {&token, 1}, 1, {}, logits);
  return logits;
}

}  // namespace clusterfusion::test
