// Every weight exactly once, everything fits: for the layers of Llama and its relatives, known and
// random ones, on the limits of several chips.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "chips.hpp"
#include "clusterfusion/error.hpp"
#include "plan/decode_plan.hpp"
#include "touched_elements.hpp"

namespace clusterfusion::plan {
namespace {

struct KnownLayer {
  const char* name;
  std::int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab;
};

constexpr KnownLayer kKnownLayers[] = {
    {"smollm2_135m", 576, 9, 3, 64, 1536, 49152},   {"llama32_1b", 2048, 32, 8, 64, 8192, 128256},
    {"llama32_3b", 3072, 24, 8, 128, 8192, 128256}, {"llama31_8b", 4096, 32, 8, 128, 14336, 128256},
    {"llama2_7b", 4096, 32, 32, 128, 11008, 32000}, {"tinyllama", 2048, 32, 4, 64, 5632, 32000},
    {"qwen25_05b", 896, 14, 2, 64, 4864, 151936},   {"qwen25_15b", 1536, 12, 2, 128, 8960, 151936},
    {"qwen25_7b", 3584, 28, 4, 128, 18944, 152064}, {"qwen3_06b", 1024, 16, 8, 128, 3072, 151936},
    {"qwen3_8b", 4096, 32, 8, 128, 12288, 151936},  {"odd", 456, 6, 2, 48, 200, 301},
};

ModelConfig any_config(const KnownLayer& shape) {
  ModelConfig config;
  config.hidden_size = shape.hidden;
  config.num_layers = 2;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = config.rotary_dim = shape.head_dim;
  config.intermediate_size = shape.intermediate;
  config.vocab_size = shape.vocab;
  config.norm = NormKind::rms_norm;
  config.gated_mlp = true;
  config.parallel_residual = config.attention_bias = config.mlp_bias = false;
  return config;
}

std::vector<MatrixPlan> matrices_of(const DecodePlan& plan) {
  return {plan.qkv, plan.attention_out, plan.mlp_up, plan.mlp_down, plan.lm_head};
}

bool touches_each_once(const MatrixPlan& matrix, int chunks) {
  return std::ranges::all_of(touched(matrix, chunks), [](int count) { return count == 1; });
}

void expect_each_weight_once(const MatrixPlan& matrix, const ModelConfig& config) {
  SCOPED_TRACE(std::to_string(matrix.rows) + " x " + std::to_string(matrix.columns));
  const std::int64_t covered = std::int64_t{matrix.chunks} * matrix.rows_per_chunk;
  EXPECT_GE(covered, matrix.rows);
  EXPECT_LT(covered - matrix.rows, matrix.rows_per_chunk);
  EXPECT_EQ(matrix.row_bytes() % 16, 0) << "bulk copies move multiples of 16 bytes";
  EXPECT_TRUE(touches_each_once(matrix, 2));
  EXPECT_LE(matrix.iterations, kWideFragments);
  for (const std::int32_t fragments : {kNarrowFragments, kWideFragments}) {
    const MatrixPlan packed = with_packed_operands(matrix, fragments);
    EXPECT_TRUE(touches_each_once(packed, 3)) << "packed";
    EXPECT_EQ(packed.rows_per_chunk, matrix.rows_per_chunk);
    if (packed.mapping == MmaMapping::two_pass) continue;
    EXPECT_FALSE(packed.is_ragged());
    EXPECT_EQ(packed.units_per_chunk() * packed.segments, kConsumerWarps);
    // A lane keeps half of what it loads of each slice of two chunks.
    const bool in_pairs = packed.mapping == MmaMapping::packed_pairs;
    EXPECT_LE(in_pairs ? packed.iterations / 2 : packed.iterations, fragments);
    // The kernel has no code for the normalised input in pairs.
    if (matrix.columns == config.hidden_size) {
      EXPECT_FALSE(in_pairs);
    }
  }
}

void expect_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const DecodePlan plan = make_decode_plan(config, limits);
  EXPECT_LE(plan.shared_bytes, limits.shared_bytes_per_block);
  EXPECT_EQ(plan.kind, LayerKind::any);
  EXPECT_EQ(plan.mlp_up.rows, 2 * config.intermediate_size);
  EXPECT_EQ(plan.mlp_up.rows_per_chunk % 2, 0) << "half of a chunk is the gate's";
  EXPECT_EQ(plan.attention_out.columns, config.attention_size());
  for (const MatrixPlan& matrix : matrices_of(plan)) {
    expect_each_weight_once(matrix, config);
    EXPECT_LE(matrix.stage_bytes(), plan.data_bytes);
    EXPECT_LE(matrix.chunk_bytes(), matrix.stages * matrix.stage_bytes());
    for (const std::int32_t fragments : {kNarrowFragments, kWideFragments})
      EXPECT_LE(with_packed_operands(matrix, fragments).sums_per_chunk(), plan.sum_slots);
  }
  EXPECT_LE(plan.kv.block_bytes, plan.data_bytes);
  EXPECT_GE(plan.input_bytes, (config.parallel_residual ? 2 : 1) * config.hidden_size * 2);
  EXPECT_EQ(plan.input_bytes % 128, 0);
  // States of the warps, 64 dimensions at a time; queries, key and value as they come, and in 16
  // bits with what rounding took from the queries; zeros. They lie over the normalised inputs and
  // the sums.
  const std::int64_t group = config.num_heads / config.kv_heads();
  const std::int64_t merged = std::min<std::int64_t>(config.head_dim, 64);
  EXPECT_LE(kConsumerWarps * group * (merged + 2) + (group + 2) * config.head_dim +
                (2 * group + 2) * config.head_dim / 2 + 4,
            plan.sum_slots + plan.input_bytes / 4);
}

class AnyLayer : public testing::TestWithParam<KnownLayer> {};

TEST_P(AnyLayer, StreamsEachWeightOnceOnEveryChip) {
  const ModelConfig config = any_config(GetParam());
  EXPECT_EQ(unstreamed_because(config, kHopper), "");
  for (const auto& [name, limits] : kChips) {
    SCOPED_TRACE(name);
    if (can_stream(config, limits)) expect_plan(config, limits);
  }
}

INSTANTIATE_TEST_SUITE_P(Known, AnyLayer, testing::ValuesIn(kKnownLayers),
                         [](const auto& info) { return std::string(info.param.name); });

// Of large chunks each result that crosses between SMs would wait for: two stages have half a row
// each, and no stage of those models is half empty.
TEST(AnyLayers, HaveWideRowsInTwoStages) {
  for (const std::int64_t intermediate : {12288, 14336, 16384}) {
    ModelConfig config = any_config(kKnownLayers[3]);
    config.intermediate_size = intermediate;
    const DecodePlan plan = make_decode_plan(config, kHopper);
    EXPECT_EQ(plan.mlp_down.stages, 2);
    EXPECT_EQ(plan.mlp_down.first_stage_columns(), intermediate / 2);
    EXPECT_FALSE(plan.mlp_down.is_ragged());
    EXPECT_EQ(plan.data_bytes, 16384);
    EXPECT_EQ(plan.stages, 13);
    for (const MatrixPlan& matrix : {plan.qkv, plan.attention_out, plan.mlp_up}) {
      EXPECT_EQ(matrix.stages, 1);
      EXPECT_EQ(matrix.chunk_bytes(), 16384);
    }
  }
}

TEST(AnyLayers, OfRandomSizesStreamOrAreRefused) {
  std::mt19937 random(3);
  const auto below = [&](unsigned end) { return static_cast<std::int64_t>(random() % end); };
  int plans = 0;
  for (int round = 0; round < 50; ++round) {
    ModelConfig config = any_config(kKnownLayers[0]);
    config.head_dim = config.rotary_dim = 16 * (1 + below(16));
    config.num_kv_heads = 1 + below(8);
    config.num_heads = config.num_kv_heads * (1 + below(10));
    config.hidden_size = 8 * (1 + below(640));
    config.intermediate_size = 8 * (1 + below(2000));
    config.vocab_size = 1 + below(3000);
    SCOPED_TRACE(testing::Message() << config.hidden_size << ", " << config.num_heads << " over "
                                    << config.num_kv_heads << " of " << config.head_dim << ", "
                                    << config.intermediate_size);
    const bool streams = unstreamed_because(config, kHopper).empty();
    EXPECT_EQ(streams, can_stream(config, kHopper));
    if (!streams) continue;
    expect_plan(config, kHopper);
    ++plans;
  }
  EXPECT_GT(plans, 20);
}

TEST(AnyLayers, SayWhatDoesNotStream) {
  ModelConfig config = any_config(kKnownLayers[1]);
  config.num_kv_heads = 2;
  EXPECT_EQ(unstreamed_because(config), "groups of more than 8 heads");
  config = any_config(kKnownLayers[1]);
  config.mlp_bias = true;
  EXPECT_EQ(unstreamed_because(config), "biases of a gated MLP");
  config.gated_mlp = false;
  EXPECT_EQ(unstreamed_because(config), "");
  EXPECT_EQ(layer_kind(config), LayerKind::any);
  config.rotary_dim = 20;
  EXPECT_EQ(unstreamed_because(config), "a rotation of dimensions that are no multiple of 8");
  config = ModelConfig{};
  config.rotary_dim = 20;  // Pythia-2.8B's
  EXPECT_EQ(layer_kind(config), LayerKind::plain);
  EXPECT_EQ(unstreamed_because(config), "");
}

}  // namespace
}  // namespace clusterfusion::plan
