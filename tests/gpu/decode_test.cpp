// Prefill and decode against the float64 reference, and against themselves bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "gpu_fixture.hpp"
#include "recorded_bits.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

// Logits at every position, prefilled in pieces of awkward sizes.
std::vector<float> logits_in_pieces(Backend& backend, std::int64_t vocab,
                                    std::span<const TokenId> tokens) {
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<float> logits(tokens.size() * width);
  const SequenceId id = backend.create_sequence({});
  std::size_t done = 0;
  for (std::size_t piece = 1; done < tokens.size(); piece = piece * 3 + 2) {
    const std::size_t count = std::min(piece, tokens.size() - done);
    PrefillOutput output;
    output.all_logits = std::span(logits).subspan(done * width, count * width);
    backend.prefill(id, tokens.subspan(done, count), output);
    done += count;
  }
  backend.release_sequence(id);
  return logits;
}

// Chosen in launches of many steps, which read what earlier steps of the launch have written.
std::vector<TokenId> tokens_in_one_launch(Backend& backend, std::span<const TokenId> prompt) {
  SamplingParams sampling;
  sampling.temperature = 1.0f;
  sampling.seed = 3;
  const SequenceId id = backend.create_sequence(sampling);
  backend.prefill(id, prompt, {});
  const std::int32_t steps = backend.info().decode_ahead;
  std::vector<TokenId> tokens{prompt.back()};
  std::vector<SampledToken> sampled(static_cast<std::size_t>(steps));
  for (int launch = 0; launch < 6; ++launch) {
    backend.decode({&id, 1}, std::vector{tokens.back()}, steps, sampled, {});
    for (const SampledToken& token : sampled) tokens.push_back(token.token);
  }
  backend.release_sequence(id);
  return tokens;
}

std::unique_ptr<Backend> backend_in(DecodeMode mode, const std::shared_ptr<const Model>& model) {
  BackendOptions options;
  options.mode = mode;
  return make_cuda_backend(model, options);
}

class DecodeKernel : public GpuTest, public testing::WithParamInterface<Shape> {};

TEST_P(DecodeKernel, MatchesFloat64AtEveryPosition) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto tokens = random_tokens(config.vocab_size, GetParam().positions, 7);
  const auto expected = reference_logits(*model, tokens);
  const auto error_of = [&](auto logits_of) {
    return relative_error(logits_of(*backend, config.vocab_size, tokens), expected);
  };
  const double prefill = error_of(all_logits);
  const double pieces = error_of(logits_in_pieces);
  const double decode = error_of(decoded_logits);
  const double rows = relative_error(
      decoded_logits(*backend_in(DecodeMode::throughput, model), config.vocab_size, tokens),
      expected);
  std::printf("%-20s relative error: prefill %.2e, in pieces %.2e, decode %.2e, of rows %.2e\n",
              GetParam().name.c_str(), prefill, pieces, decode, rows);
  const double allowed = config.dtype == DType::float16 ? 2e-3 : 1.5e-2;
  EXPECT_LT(prefill, allowed);
  EXPECT_LT(pieces, allowed);
  EXPECT_LT(decode, allowed);
  EXPECT_LT(rows, allowed);
}

TEST_P(DecodeKernel, IsBitIdenticalFromRunToRun) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto tokens = random_tokens(config.vocab_size, GetParam().positions, 8);
  const auto prefilled = all_logits(*backend, config.vocab_size, tokens);
  const auto decoded = decoded_logits(*backend, config.vocab_size, tokens);
  expect_recorded_bits("prefill/" + GetParam().name, std::as_bytes(std::span(prefilled)));
  expect_recorded_bits("decode/" + GetParam().name, std::as_bytes(std::span(decoded)));
  const auto drawn = tokens_in_one_launch(*backend, tokens);
  expect_recorded_bits("tokens/" + GetParam().name, std::as_bytes(std::span(drawn)));
  for (int repeat = 0; repeat < 3; ++repeat) {
    ASSERT_EQ(all_logits(*backend, config.vocab_size, tokens), prefilled) << "repeat " << repeat;
    ASSERT_EQ(decoded_logits(*backend, config.vocab_size, tokens), decoded) << "repeat " << repeat;
  }
  const auto rows = backend_in(DecodeMode::throughput, model);
  const auto of_rows = decoded_logits(*rows, config.vocab_size, tokens);
  for (int repeat = 0; repeat < 3; ++repeat)
    ASSERT_EQ(decoded_logits(*rows, config.vocab_size, tokens), of_rows) << "repeat " << repeat;
  const auto other = make_cuda_backend(model, {});
  ASSERT_EQ(decoded_logits(*other, config.vocab_size, tokens), decoded) << "another backend";
}

INSTANTIATE_TEST_SUITE_P(Unstreamed, DecodeKernel, testing::ValuesIn(unstreamed_shapes()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Shapes, DecodeKernel, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
