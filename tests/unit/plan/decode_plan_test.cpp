// Every weight exactly once, everything fits: for every Pythia size, on the limits of several
// chips.
#include "plan/decode_plan.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "chips.hpp"
#include "clusterfusion/error.hpp"
#include "touched_elements.hpp"

namespace clusterfusion::plan {
namespace {

struct Shape {
  const char* name;
  std::int64_t hidden, layers, heads, vocab;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) { return out << shape.name; }

constexpr Shape kShapes[] = {
    {"pythia_14m", 128, 6, 4, 50304},
    {"pythia_31m", 256, 6, 8, 50304},
    {"pythia_70m", 512, 6, 8, 50304},
    {"pythia_160m", 768, 12, 12, 50304},
    {"pythia_410m", 1024, 24, 16, 50304},
    {"pythia_1b", 2048, 16, 8, 50304},
    {"pythia_1b4", 2048, 24, 16, 50304},
    {"pythia_2b8", 2560, 32, 32, 50304},
    {"pythia_6b9", 4096, 32, 32, 50432},
    {"pythia_12b", 5120, 36, 40, 50688},
    {"demo", 256, 8, 4, 4096},
    {"odd", 96, 3, 6, 301},
};

ModelConfig config_of(const Shape& shape) {
  ModelConfig config;
  config.hidden_size = shape.hidden;
  config.num_layers = shape.layers;
  config.num_heads = shape.heads;
  config.head_dim = shape.hidden / shape.heads;
  config.intermediate_size = 4 * shape.hidden;
  config.vocab_size = shape.vocab;
  config.max_positions = 2048;
  return config;
}

class EveryShape : public testing::TestWithParam<Shape> {
 protected:
  static std::vector<MatrixPlan> matrices(const DecodePlan& plan) {
    return {plan.qkv, plan.attention_out, plan.mlp_up, plan.mlp_down, plan.lm_head};
  }
};

TEST_P(EveryShape, TouchesEachElementOnce) {
  const DecodePlan plan = make_decode_plan(config_of(GetParam()), kHopper);
  for (const MatrixPlan& matrix : matrices(plan)) {
    EXPECT_THAT(touched(matrix, 3), testing::Each(1)) << matrix.rows << " x " << matrix.columns;
    // A warp's activations stay in registers: its segment must not depend on the unit.
    EXPECT_EQ(kConsumerWarps % matrix.segments, 0);
  }
}

TEST_P(EveryShape, TouchesEachElementOnceWithPackedOperands) {
  const DecodePlan plan = make_decode_plan(config_of(GetParam()), kHopper);
  for (const MatrixPlan& matrix : matrices(plan)) {
    const MatrixPlan half = with_packed_operands(matrix);
    EXPECT_THAT(touched(half, 5), testing::Each(1)) << matrix.rows << " x " << matrix.columns;
    EXPECT_EQ(half.rows_per_chunk, matrix.rows_per_chunk);
    // What is multiplied by the normalised input: the kernel has code for that with the other
    // mappings only.
    if (half.columns == GetParam().hidden) {
      EXPECT_NE(half.mapping, MmaMapping::packed_pairs);
    }
    // What the plan has reserved is enough.
    EXPECT_LE(half.sums_per_chunk(), matrix.sums_per_chunk());
    if (half.mapping == MmaMapping::two_pass) {
      EXPECT_EQ(half.segments, matrix.segments);
      continue;
    }
    // Each warp has one unit of a chunk, or of two.
    EXPECT_EQ(half.units_per_chunk() * half.segments, kConsumerWarps);
    EXPECT_EQ(half.segment_columns(), half.slices() * half.iterations * 32);
    // A lane keeps half of what it loads of each slice: no more registers than before.
    EXPECT_LE(half.iterations, 2 * matrix.iterations);
  }
}

TEST(WithPackedOperands, KnowsTheMatricesOfPythia2b8) {
  const DecodePlan plan = make_decode_plan(config_of({"", 2560, 32, 32, 50304}), kHopper);
  for (const MatrixPlan& matrix : {plan.qkv, plan.mlp_up, plan.attention_out, plan.lm_head}) {
    const MatrixPlan half = with_packed_operands(matrix);
    EXPECT_EQ(half.mapping, MmaMapping::packed);
    EXPECT_EQ(half.unit_rows, 4);
    EXPECT_EQ(half.slices(), 2);
    EXPECT_EQ(half.segments, 4 * matrix.segments);
    EXPECT_EQ(half.iterations, matrix.iterations);
  }
  const MatrixPlan half = with_packed_operands(plan.mlp_down);
  EXPECT_EQ(half.mapping, MmaMapping::packed_pairs);
  EXPECT_EQ(half.segments, 8);
  EXPECT_EQ(half.iterations, 2 * plan.mlp_down.iterations);
  // Once more changes nothing.
  EXPECT_EQ(with_packed_operands(half).iterations, half.iterations);
}

// Chunks are made a little smaller so that each warp has one unit of each.
TEST(WithPackedOperands, KnowsTheMatricesOfModelsOf1024And2048) {
  for (const Shape& shape : {Shape{"", 1024, 24, 16, 50304}, Shape{"", 2048, 24, 16, 50304}}) {
    const DecodePlan plan = make_decode_plan(config_of(shape), kHopper);
    for (const MatrixPlan& matrix : {plan.qkv, plan.mlp_up, plan.lm_head}) {
      EXPECT_EQ(matrix.chunk_bytes(), 16384);
      EXPECT_EQ(with_packed_operands(matrix).mapping, MmaMapping::packed);
    }
    // An SM's share of [1024, 1024] is less than that.
    EXPECT_EQ(with_packed_operands(plan.attention_out).mapping,
              shape.hidden == 1024 ? MmaMapping::two_pass : MmaMapping::packed);
    EXPECT_EQ(with_packed_operands(plan.mlp_down).mapping,
              shape.hidden == 1024 ? MmaMapping::packed : MmaMapping::packed_pairs);
  }
}

TEST_P(EveryShape, CutsTheRowsWithoutGapOrOverlap) {
  const DecodePlan plan = make_decode_plan(config_of(GetParam()), kHopper);
  for (const MatrixPlan& matrix : matrices(plan)) {
    const std::int64_t covered = static_cast<std::int64_t>(matrix.chunks) * matrix.rows_per_chunk;
    EXPECT_GE(covered, matrix.rows);
    EXPECT_LT(covered - matrix.rows, matrix.rows_per_chunk);
    EXPECT_EQ(matrix.row_bytes() % 16, 0) << "bulk copies move multiples of 16 bytes";
  }
}

TEST_P(EveryShape, FitsIntoSharedMemory) {
  for (const auto& [name, limits] : kChips) {
    SCOPED_TRACE(name);
    const ModelConfig config = config_of(GetParam());
    // The widest rows need more than the small chips have for two stages.
    const bool fits = config.hidden_size < 5120 || limits.shared_bytes_per_block > 99 * 1024;
    ASSERT_EQ(can_stream(config, limits), fits);
    if (!fits) {
      EXPECT_THROW(make_decode_plan(config, limits), Error);
      continue;
    }
    const DecodePlan plan = make_decode_plan(config, limits);
    EXPECT_LE(plan.shared_bytes, limits.shared_bytes_per_block);
    EXPECT_GE(plan.stages, 2);
    EXPECT_EQ(plan.data_bytes % 128, 0);
    EXPECT_EQ(plan.stage_bytes % 128, 0);
    for (const MatrixPlan& matrix : matrices(plan)) {
      EXPECT_LE(matrix.chunk_bytes(), plan.data_bytes);
      // Biases in float32, from anywhere in their first 16 bytes to the end of their last; the LM
      // head has none.
      if (matrix.rows != config.vocab_size) {
        EXPECT_LE(12 + matrix.rows_per_chunk * 4 + 12, plan.stage_bytes - plan.data_bytes);
      }
      EXPECT_LE(matrix.sums_per_chunk(), plan.sum_slots);
    }
    EXPECT_LE(plan.kv.block_bytes, plan.data_bytes);
    // The warps' states of one head, and its query, key and value twice, share the sums.
    EXPECT_LE(kConsumerWarps * (config.head_dim + 2) + 3 * config.head_dim +
                  (3 * config.head_dim + 1) / 2,
              plan.sum_slots);
  }
}

TEST_P(EveryShape, KeepsAPageTogether) {
  const ModelConfig config = config_of(GetParam());
  const KvPlan kv = make_decode_plan(config, kHopper).kv;
  EXPECT_EQ(kKvPagePositions % kv.block_positions, 0);
  EXPECT_GE(kv.block_positions, kMinKvBlockPositions);
  EXPECT_EQ(kv.block_bytes * (kKvPagePositions / kv.block_positions), kv.head_bytes);
  EXPECT_EQ(kv.head_bytes, kKvPagePositions * config.head_dim * 2 * 2);
  EXPECT_EQ(kv.page_bytes, kv.head_bytes * config.num_heads * config.num_layers);
}

TEST_P(EveryShape, HasPagesOfEitherType) {
  const ModelConfig config = config_of(GetParam());
  for (const auto& [dtype, bytes] : {std::pair{DType::bfloat16, 2}, {DType::float32, 4}}) {
    const KvPlan kv = make_page_plan(config, dtype);
    EXPECT_EQ(kv.dtype, dtype);
    EXPECT_EQ(kv.block_positions, kKvPagePositions);
    EXPECT_EQ(kv.block_bytes, kv.head_bytes);
    EXPECT_EQ(kv.head_bytes, kKvPagePositions * config.head_dim * 2 * bytes);
    EXPECT_EQ(kv.page_bytes, kv.head_bytes * config.num_heads * config.num_layers);
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EveryShape, testing::ValuesIn(kShapes),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(AttentionSplits, CoverEveryBlockOnceWithinTheirBound) {
  for (const int block_positions : {16, 32, 64})
    for (const auto& [heads, head_dim] : {std::pair{1, 16}, {8, 256}, {32, 80}, {40, 128}})
      for (const int sms : {1, 7, 132, 170})
        for (int positions = 1; positions <= 4096; positions += positions < 200 ? 1 : 61) {
          const AttentionSplits splits =
              attention_splits(positions, block_positions, heads, head_dim, sms);
          EXPECT_EQ(splits.blocks, (positions + block_positions - 1) / block_positions);
          EXPECT_GE(splits.splits * splits.blocks_per_split, splits.blocks);
          EXPECT_LT((splits.splits - 1) * splits.blocks_per_split, splits.blocks);
          // One task for an SM, and what the combiners can take.
          EXPECT_LE(splits.splits * heads, std::max(sms, heads));
          EXPECT_LE(splits.splits, kMaxSplits);
          // No split but the last is too small to be worth it, unless a page is larger than that.
          if (splits.splits > 1) {
            EXPECT_GT((splits.blocks_per_split * block_positions + kKvPagePositions) * head_dim * 4,
                      kMinSplitBytes);
          }
        }
}

// SMs draw tickets in any order; each chunk must be assigned once.
TEST(WorkSchedule, AssignsEachChunkOnce) {
  std::mt19937 random(5);
  for (const int sms : {1, 7, 131, 132, 170})
    for (const int chunks : {0, 1, 5, 131, 132, 133, 3584, 10061})
      for (const int percent : {0, 30, 70, 100})
        for (const int ticket_chunks : {1, 2, 3}) {
          const WorkSchedule schedule = work_schedule(chunks, percent, sms);
          std::vector<int> count(chunks, 0);
          for (int sm = 0; sm < sms; ++sm)
            for (int round = 0; round < schedule.static_rounds; ++round)
              ++count.at(round * sms + sm);
          std::vector<int> drawing(sms);
          std::iota(drawing.begin(), drawing.end(), 0);
          for (int ticket = schedule.first_dynamic; !drawing.empty(); ticket += ticket_chunks) {
            const auto who = random() % drawing.size();
            if (ticket >= chunks) drawing.erase(drawing.begin() + static_cast<long>(who));
            for (int chunk = ticket; chunk < std::min(ticket + ticket_chunks, chunks); ++chunk)
              ++count.at(chunk);
          }
          ASSERT_THAT(count, testing::Each(1))
              << sms << " SMs, " << chunks << " chunks, " << percent << " %";
        }
}

// The streams of a layer in order; behind each what must have come before it.
TEST(LayerPhases, KeepEveryDependency) {
  for (const bool parallel : {true, false}) {
    std::vector<Stream> order;
    for (int i = 0; i < layer_phases(parallel); ++i) {
      const Phase phase = layer_phase(parallel, i);
      if (phase.attention_before) order.push_back(Stream::attention);
      order.push_back(phase.first);
      if (phase.second != Stream::none) order.push_back(phase.second);
    }
    EXPECT_THAT(order, testing::UnorderedElementsAre(Stream::qkv, Stream::mlp_up, Stream::attention,
                                                     Stream::mlp_down, Stream::attention_out));
    const auto at = [&](Stream stream) { return std::find(order.begin(), order.end(), stream); };
    EXPECT_LT(at(Stream::qkv), at(Stream::attention));
    EXPECT_LT(at(Stream::attention), at(Stream::attention_out));
    EXPECT_LT(at(Stream::mlp_up), at(Stream::mlp_down));
    if (!parallel) {
      EXPECT_LT(at(Stream::attention_out), at(Stream::mlp_up));
    }
  }
}

// Whoever leaves the first phase for attention leaves chunks to others: there must be some, and no
// QKV rows among the chunks.
TEST(LayerPhases, SomeStayWhereOthersLeaveForAttention) {
  for (const int sms : {1, 2, 3, 7, 132, 170}) {
    for (int tasks = 1; tasks <= sms; ++tasks) {
      EXPECT_FALSE(leaves_for_attention(tasks, 256, sms) && tasks == sms);
    }
  }
  EXPECT_TRUE(leaves_for_attention(24, 256, 132));
  EXPECT_FALSE(leaves_for_attention(128, 256, 132));
  EXPECT_FALSE(leaves_for_attention(24, 80, 132));
  for (const int chunks : {1, 2, 100}) {
    EXPECT_GE(leave_for_attention_from(chunks, chunks), chunks);
    EXPECT_LE(leave_for_attention_from(chunks, chunks), 2 * chunks);
  }
}

TEST_P(EveryShape, CanBeStreamed) { EXPECT_TRUE(can_stream(config_of(GetParam()), kHopper)); }

// Sizes that can be streamed and others, on devices with much and little shared memory.
TEST(CanStream, SaysWhetherThereIsAPlan) {
  int plans = 0, refusals = 0;
  for (const std::int64_t hidden : {1, 33, 96, 128, 352, 1040, 2560, 2816, 5120, 6144})
    for (const std::int64_t heads : {1, 2, 3, 8, 16, 32, 40, 64})
      for (const std::int64_t intermediate : {1, 77, 352, 512, 10240, 20480, 24576, 65536})
        for (const DeviceLimits& limits : {kHopper, DeviceLimits{132, 48 * 1024}}) {
          if (hidden % heads != 0) continue;
          ModelConfig config;
          config.num_layers = 1;
          config.hidden_size = config.vocab_size = hidden;
          config.num_heads = heads;
          config.head_dim = hidden / heads;
          config.intermediate_size = intermediate;
          bool planned = true;
          try {
            make_decode_plan(config, limits);
          } catch (const Error& error) {
            EXPECT_EQ(error.kind(), ErrorKind::unsupported);
            planned = false;
          }
          EXPECT_EQ(can_stream(config, limits), planned)
              << hidden << " in " << heads << " heads, " << intermediate;
          ++(planned ? plans : refusals);
        }
  EXPECT_GT(plans, 20);
  EXPECT_GT(refusals, 20);
}

TEST(MakeDecodePlan, RefusesWhatItCannotStream) {
  const auto message = [](const ModelConfig& config, const DeviceLimits& limits) -> std::string {
    try {
      make_decode_plan(config, limits);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      return error.what();
    }
    return "nothing was thrown";
  };
  ModelConfig config = config_of({"", 100, 2, 4, 301});
  EXPECT_THAT(message(config, kHopper), testing::HasSubstr("the QKV matrix [300, 100]"));
  config = config_of({"", 256, 2, 32, 301});
  EXPECT_THAT(message(config, kHopper),
              testing::HasSubstr("a multiple of 16 and at most 256, found 8"));
  config = config_of({"", 256, 2, 4, 301});
  EXPECT_THAT(message(config, {1, 48 * 1024}), testing::HasSubstr("bytes of shared memory"));
}

}  // namespace
}  // namespace clusterfusion::plan
