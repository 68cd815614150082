// The test-only family, and every kind of layer, on the GPU through the program alone: prompts and
// decode steps against the float64 reference.
#include <gmock/gmock.h>

#include <cmath>

#include "clusterfusion/error.hpp"
#include "gpu_fixture.hpp"
#include "support/grouped_checkpoint.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

class FamilyTest : public GpuTest {};

// As for the shapes of the other tests. On an H200 kinds of layers were up to 1.1e-3 off in
// float16.
double tolerance(DType dtype) { return dtype == DType::float16 ? 2e-3 : 1.5e-2; }

void expect_float64(const std::shared_ptr<const Model>& model, int count) {
  const std::int64_t vocab = model->config().vocab_size;
  const double most = tolerance(model->config().dtype);
  const auto tokens = random_tokens(vocab, count, 5);
  const std::vector<double> want = reference_logits(*model, tokens);
  const auto backend = make_cuda_backend(model, {});
  EXPECT_LE(relative_error(all_logits(*backend, vocab, tokens), want), most);
  EXPECT_LE(relative_error(decoded_logits(*backend, vocab, tokens), want), most)
      << backend->info().device;
}

TEST_F(FamilyTest, EqualsFloat64) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    SCOPED_TRACE(name_of(dtype));
    expect_float64(open_grouped_model(grouped_config(), dtype), 150);
  }
}

// More than one KV head, groups of 1, 2, 4 and all, heads of several sizes.
TEST_F(FamilyTest, GroupsShareKeysAndValues) {
  for (const auto& [heads, kv_heads, head_dim] :
       {std::tuple{8, 4, 16}, {8, 8, 32}, {4, 1, 80}, {8, 2, 128}, {2, 1, 256}}) {
    SCOPED_TRACE(std::to_string(heads) + " heads over " + std::to_string(kv_heads));
    ModelConfig config = small_config();
    config.num_heads = heads;
    config.num_kv_heads = kv_heads;
    config.head_dim = head_dim;
    config.hidden_size = std::int64_t{heads} * head_dim;
    config.rotary_dim = head_dim / 2;
    expect_float64(make_random_model(config), 140);
  }
}

TEST_F(FamilyTest, EveryKindOfLayer) {
  for (int bits = 0; bits < 32; ++bits) {
    SCOPED_TRACE("kind " + std::to_string(bits));
    ModelConfig config = config_of({"kind", 128, 4, 512, 2, 301, 8});
    config.norm = (bits & 1) != 0 ? NormKind::rms_norm : NormKind::layer_norm;
    config.parallel_residual = (bits & 2) != 0;
    config.gated_mlp = (bits & 4) != 0;
    config.attention_bias = config.mlp_bias = (bits & 8) != 0;
    config.num_kv_heads = (bits & 16) != 0 ? 1 : 4;
    expect_float64(make_random_model(config), 40);
  }
}

// Llama and its relatives: refused before anything is copied, so that device "auto" takes the CPU.
TEST_F(FamilyTest, RefusesWhatNothingHereComputes) {
  for (const bool is_hidden : {true, false}) {
    ModelConfig config = small_llama_config();
    config.hidden_size = is_hidden ? 92 : 96;
    config.intermediate_size = is_hidden ? 96 : 92;
    try {
      make_cuda_backend(make_random_model(config), {});
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      EXPECT_THAT(error.what(),
                  ::testing::AllOf(
                      ::testing::HasSubstr("qwen3 do not run on a GPU yet"),
                      ::testing::HasSubstr(is_hidden ? "a hidden size that" : "an MLP whose size"),
                      ::testing::HasSubstr("use device \"cpu\"")));
    }
  }
}

// A batch, several steps a call, sampling: what each sequence has alone.
void expect_batches_as_alone(const std::shared_ptr<const Model>& model, DecodeMode mode) {
  SCOPED_TRACE(name_of(mode));
  BackendOptions options;
  options.mode = mode;
  const auto backend = make_cuda_backend(model, options);
  constexpr std::int32_t kSteps = 5;
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (unsigned i = 0; i < 3; ++i) {
    ids.push_back(backend->create_sequence({.temperature = 0.8f, .seed = i}));
    backend->prefill(ids.back(), random_tokens(301, 20 + 30 * static_cast<int>(i), i), {});
    inputs.push_back(static_cast<TokenId>(i + 1));
  }
  std::vector<SampledToken> together(kSteps * ids.size());
  backend->decode(ids, inputs, kSteps, together, {});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(backend->length(ids[i]), 20 + 30 * static_cast<int>(i) + kSteps);
    backend->truncate(ids[i], 20 + 30 * static_cast<int>(i));
    std::vector<SampledToken> alone(kSteps);
    backend->decode(std::span(&ids[i], 1), std::span(&inputs[i], 1), kSteps, alone, {});
    for (std::size_t step = 0; step < kSteps; ++step)
      EXPECT_EQ(alone[step].token, together[step * ids.size() + i].token);
  }
}

TEST_F(FamilyTest, BatchesAreWhatSequencesAloneAre) {
  const auto model = open_grouped_model(grouped_config());
  for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput})
    expect_batches_as_alone(model, mode);
}

// The same words for the same faults as on the CPU (tests/unit/cpu/errors_test.cpp).
TEST_F(FamilyTest, AnUnknownSequenceIsTheSameErrorAsOnTheCpu) {
  const auto model = make_random_model(config_of({"small", 128, 4, 512, 1, 301, 8}));
  const auto cuda = make_cuda_backend(model, {});
  const auto cpu = make_cpu_backend(model, {});
  const auto message_of = [](Backend& backend) {
    try {
      backend.truncate(77, 0);
    } catch (const Error& error) {
      return std::pair(error.kind(), std::string(error.what()));
    }
    return std::pair(ErrorKind::internal, std::string("no error"));
  };
  EXPECT_EQ(message_of(*cuda), message_of(*cpu));
  EXPECT_EQ(message_of(*cuda).first, ErrorKind::invalid_argument);
}

}  // namespace
}  // namespace clusterfusion::test
