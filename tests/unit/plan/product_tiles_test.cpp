// How the products of many rows are cut: for every size, streamed or not.
#include "plan/product_tiles.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <vector>

#include "chips.hpp"
#include "plan/decode_plan.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::plan {
namespace {

ModelConfig config_of(std::int64_t hidden, std::int64_t heads, std::int64_t intermediate) {
  ModelConfig config;
  config.hidden_size = hidden;
  config.num_heads = heads;
  config.head_dim = hidden / heads;
  config.intermediate_size = intermediate;
  config.num_layers = 2;
  config.vocab_size = 50432;
  return config;
}

TEST(CutProducts, MultipliesEveryColumnOnceInSizesThatDoNotStream) {
  for (const ModelConfig& config :
       {config_of(6144, 64, 24576), config_of(2816, 44, 11264), config_of(704, 11, 1856),
        config_of(672, 7, 1056), config_of(7168, 56, 28672), config_of(96, 1, 32)}) {
    const ProductCuts cuts = cut_products(config);
    for (const ProductCut* cut :
         {&cuts.qkv, &cuts.mlp_up, &cuts.mlp_down, &cuts.attention_out, &cuts.lm_head}) {
      SCOPED_TRACE(testing::Message() << "[" << cut->rows << ", " << cut->columns << "]");
      EXPECT_EQ(cut->piece_columns() * cut->pieces * cut->parts, cut->columns);
      EXPECT_EQ(cut->piece_columns() % kStepColumns, 0);
      EXPECT_GE(kConsumerWarps * cut->iterations, cut->piece_steps());
      EXPECT_LE(cut->iterations, kMaxPieceIterations);
      EXPECT_GE(std::int64_t{cut->chunks} * kChunkRows, cut->rows);
    }
    EXPECT_EQ(cuts.qkv.parts, 1);
    EXPECT_EQ(cuts.lm_head.parts, 1);
    EXPECT_LT(cuts.mlp_down.parts, kMaxResidualParts);
  }
}

TEST(UnstreamedBecause, TellsLayersAndSizesThatNoKernelStreams) {
  EXPECT_EQ(unstreamed_because(config_of(2560, 32, 10240), kHopper), "");
  for (const ModelConfig& config : {config_of(6144, 64, 24576), config_of(2816, 44, 11264)})
    EXPECT_EQ(unstreamed_because(config, kHopper), "sizes that no kernel streams");
  ModelConfig grouped = config_of(2560, 32, 10240);
  grouped.num_kv_heads = 8;
  EXPECT_EQ(unbatched_because(grouped), "grouped heads");
  EXPECT_EQ(unstreamed_because(grouped, kHopper), "");
  grouped.num_kv_heads = 2;
  EXPECT_EQ(unstreamed_because(grouped, kHopper), "groups of more than 8 heads");
  EXPECT_EQ(uncomputed_because(grouped), "");
  ModelConfig separate = config_of(2560, 32, 10240);
  separate.qkv_layout = QkvLayout::separate;
  EXPECT_EQ(unstreamed_because(separate, kHopper), "") << "kernels see one matrix";
  ModelConfig normed = config_of(2560, 32, 10240);
  normed.qk_norm = true;
  EXPECT_EQ(uncomputed_because(normed), "");
  EXPECT_EQ(unbatched_because(normed), "norms of queries and keys");
  EXPECT_EQ(unstreamed_because(normed, kHopper), "");
}

TEST(UncomputedBecause, TellsSizes) {
  ModelConfig config = config_of(2560, 32, 10240);
  config.qkv_layout = QkvLayout::separate;
  config.qk_norm = true;
  EXPECT_EQ(uncomputed_because(config), "");
  config.intermediate_size = 10244;
  EXPECT_EQ(uncomputed_because(config), "an MLP whose size is no multiple of 8");
  config.hidden_size = 2556;
  EXPECT_EQ(uncomputed_because(config), "a hidden size that is no multiple of 8");
}

// Blocks on the busiest multiprocessor times their chunks: what a launch takes, about.
std::int64_t longest(std::span<const std::int32_t> chunks, std::int32_t row_blocks,
                     std::int32_t size, std::int32_t sm_count) {
  std::int64_t blocks = 0;
  for (const std::int32_t count : chunks) blocks += (count + size - 1) / size * row_blocks;
  return (blocks + sm_count - 1) / sm_count * size;
}

TEST(TileChunks, AreInRangeAndLeaveFewMultiprocessorsWaiting) {
  for (const std::int32_t sm_count : {78, 114, 132, 148})
    for (const std::int32_t row_blocks : {1, 2, 3, 4})
      for (const std::int32_t most : {20, 24})
        for (const std::vector<std::int32_t>& chunks : {std::vector<std::int32_t>{960, 1280},
                                                        {320, 320, 320, 320, 320},
                                                        {6288},
                                                        {3},
                                                        {128}}) {
          const std::int32_t size = tile_chunks(chunks, row_blocks, {most, 4}, sm_count);
          ASSERT_GE(size, 1);
          ASSERT_LE(size, most);
          std::int64_t all = 0;
          for (const std::int32_t count : chunks) all += count;
          const std::int64_t even = (all * row_blocks + sm_count - 1) / sm_count;
          // Within a block's cost and a quarter of what would be even.
          EXPECT_LE(longest(chunks, row_blocks, size, sm_count), even * 5 / 4 + 2)
              << "size " << size << ", " << row_blocks << " blocks of rows, " << sm_count;
        }
}

TEST(TileChunks, FillTheMultiprocessorsOfAnH200ForPythia2B8) {
  // QKV and MLP-up: tiles of 17 chunks would be 57 and 76, one too many for 132 multiprocessors.
  EXPECT_EQ(tile_chunks(std::array{960, 1280}, 1, {24, 4}, 132), 18);
}

}  // namespace
}  // namespace clusterfusion::plan
