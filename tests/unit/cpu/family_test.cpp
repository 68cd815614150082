// The test-only family from config.json to logits, and every kind of layer, against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "sequences.hpp"
#include "support/gathered_model.hpp"
#include "support/grouped_checkpoint.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

// Largest difference over the largest logit.
double relative_error(std::span<const float> got, std::span<const double> want) {
  double worst = 0, largest = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(got[i] - want[i]) <= worst)) worst = std::abs(got[i] - want[i]);
    largest = std::max(largest, std::abs(want[i]));
  }
  return worst / largest;
}
constexpr double kBound = 32 * 0x1p-23;

TEST(GroupedFamily, EqualsFloat64) {
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32}) {
    const auto model = open_grouped_model(grouped_config(), dtype);
    EXPECT_EQ(model->config().model_type, "grouped");
    EXPECT_EQ(model->config().num_kv_heads, 2);
    EXPECT_EQ(model->config().dtype, dtype);
    const auto tokens = random_tokens(model->config(), 150, 7);
    const std::vector<double> want = reference_logits(*model, tokens);
    const auto backend = make_cpu_backend(model, {});
    EXPECT_EQ(backend->info().kv_bytes_per_position, 3 * 2 * 2 * 16 * 4);
    EXPECT_LE(relative_error(all_logits(*backend, model->config(), tokens), want), kBound);
  }
}

TEST(GroupedFamily, DecodesWhatItPrefills) {
  const auto model = open_grouped_model(grouped_config());
  const ModelConfig& config = model->config();
  const auto tokens = random_tokens(config, 90, 8);
  const auto backend = make_cpu_backend(model, {});
  const std::vector<float> prefilled = all_logits(*backend, config, tokens);
  const SequenceId id = backend->create_sequence({});
  std::vector<float> decoded;
  for (const TokenId token : tokens) {
    const auto logits = decode_logits(*backend, config, id, token);
    decoded.insert(decoded.end(), logits.begin(), logits.end());
  }
  EXPECT_EQ(prefilled, decoded);
}

TEST(GroupedFamily, RefusesHeadsThatDoNotDivide) {
  nlohmann::json json = grouped_config();
  json["num_key_value_heads"] = 3;
  test::expect_error(ErrorKind::malformed, {"num_key_value_heads", "divisor", "8", "3"},
                     [&] { open_grouped_model(json); });
}

// Norm, residual form, MLP, biases and groups in every combination.
TEST(LayerKinds, EqualFloat64) {
  for (int bits = 0; bits < 64; ++bits) {
    ModelConfig config = small_config();
    config.num_layers = 2;
    config.intermediate_size = 52;
    config.norm = (bits & 1) != 0 ? NormKind::rms_norm : NormKind::layer_norm;
    config.parallel_residual = (bits & 2) != 0;
    config.gated_mlp = (bits & 4) != 0;
    config.attention_bias = (bits & 8) != 0;
    config.mlp_bias = (bits & 16) != 0;
    config.num_kv_heads = (bits & 32) != 0 ? 1 : 2;
    const auto model = make_random_model(config);
    const auto tokens = random_tokens(config, 40, 9);
    const auto backend = make_cpu_backend(model, {});
    EXPECT_LE(
        relative_error(all_logits(*backend, config, tokens), reference_logits(*model, tokens)),
        kBound)
        << "kind " << bits;
  }
}

// The Llama layout with each of its options, and the sizes of a head apart from the hidden size.
TEST(LlamaLayout, EqualsFloat64) {
  for (int bits = 0; bits < 64; ++bits) {
    ModelConfig config = small_llama_config();
    config.num_layers = 2;
    config.qk_norm = (bits & 1) != 0;
    config.attention_bias = (bits & 2) != 0;
    config.attention_out_bias = (bits & 4) != 0;
    config.mlp_bias = (bits & 8) != 0;
    config.parallel_residual = (bits & 16) != 0;
    config.num_kv_heads = (bits & 32) != 0 ? 9 : 3;
    config.head_dim = config.rotary_dim = (bits & 1) != 0 ? 64 : 10;
    config.tied_embeddings = (bits & 3) == 0;
    config.dtype = (bits & 4) != 0 ? DType::float16 : DType::bfloat16;
    const auto model = make_random_model(config);
    const auto tokens = random_tokens(config, 40, 9);
    const auto backend = make_cpu_backend(model, {});
    EXPECT_LE(
        relative_error(all_logits(*backend, config, tokens), reference_logits(*model, tokens)),
        kBound)
        << "kind " << bits;
  }
}

// One matrix for queries, keys and values beside norms of queries and keys.
TEST(LlamaLayout, NormsOfQueriesAndKeysBesideOneMatrix) {
  ModelConfig config = small_llama_config();
  config.qkv_layout = QkvLayout::by_kv_head;
  const auto model = make_random_model(config);
  const auto tokens = random_tokens(config, 40, 9);
  const auto backend = make_cpu_backend(model, {});
  EXPECT_LE(relative_error(all_logits(*backend, config, tokens), reference_logits(*model, tokens)),
            kBound);
}

// As a GPU has it: what reads one matrix gets the same numbers out of it.
TEST(LlamaLayout, OneGatheredMatrixGivesTheSameBits) {
  for (const std::int64_t kv_heads : {1, 3, 9}) {
    ModelConfig config = small_llama_config();
    config.num_kv_heads = kv_heads;
    config.qk_norm = kv_heads != 3;
    const auto model = make_random_model(config);
    const auto tokens = random_tokens(config, 70, 9);
    const auto gathered = std::make_shared<GatheredModel>(model);
    const auto want = all_logits(*make_cpu_backend(model, {}), config, tokens);
    EXPECT_EQ(all_logits(*make_cpu_backend(gathered, {}), config, tokens), want) << kv_heads;
  }
}

}  // namespace
}  // namespace clusterfusion::test
