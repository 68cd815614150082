// The whole forward pass against the float64 reference, and against itself bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "backend/backend.hpp"
#include "support/random_model.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

std::vector<TokenId> random_tokens(const ModelConfig& config, std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& t : tokens) t = static_cast<TokenId>(random() % config.vocab_size);
  return tokens;
}

std::vector<float> all_logits(Backend& backend, const ModelConfig& config,
                              std::span<const TokenId> tokens) {
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(config.vocab_size));
  const SequenceId id = backend.create_sequence({});
  PrefillOutput output;
  output.all_logits = logits;
  backend.prefill(id, tokens, output);
  backend.release_sequence(id);
  return logits;
}

TEST(Forward, Small) {
  const auto model = make_random_model(small_config());
  const auto backend = make_cpu_backend(model, {});
  const auto tokens = random_tokens(model->config(), 150, 7);
  const auto got = all_logits(*backend, model->config(), tokens);
  const auto want = reference_logits(*model, tokens);
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(got[i] - want[i]));
  EXPECT_LT(worst, 1e-5);
  // one by one
  const SequenceId id = backend->create_sequence({});
  const std::size_t vocab = 301;
  std::vector<float> row(vocab);
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const TokenId in[1] = {tokens[t]};
    const SequenceId ids[1] = {id};
    backend->decode(ids, in, 1, {}, row);
    ASSERT_TRUE(std::equal(row.begin(), row.end(), got.begin() + t * vocab)) << t;
  }
}

}  // namespace
}  // namespace clusterfusion::test
