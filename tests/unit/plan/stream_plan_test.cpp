// The plan of the streaming kernel for many rows: every weight once, and everything fits.
#include "plan/stream_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "chips.hpp"
#include "clusterfusion/error.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {
namespace {

struct Size {
  const char* name;
  std::int64_t hidden, heads, vocab;
};
const std::vector<Size> kSizes = {
    {"14m", 128, 4, 50304},    {"31m", 256, 8, 50304},    {"70m", 512, 8, 50304},
    {"160m", 768, 12, 50304},  {"410m", 1024, 16, 50304}, {"1b", 2048, 8, 50304},
    {"1.4b", 2048, 16, 50304}, {"2.8b", 2560, 32, 50304}, {"6.9b", 4096, 32, 50432},
    {"12b", 5120, 40, 50688},
};

ModelConfig config_of(const Size& size) {
  ModelConfig config;
  config.hidden_size = size.hidden;
  config.num_heads = size.heads;
  config.head_dim = size.hidden / size.heads;
  config.intermediate_size = 4 * size.hidden;
  config.num_layers = 2;
  config.vocab_size = size.vocab;
  return config;
}

// How often each step (32 columns) of a row is multiplied, by the warps in their runs of steps.
std::vector<int> times_multiplied(const ProductCut& cut) {
  std::vector<int> times(cut.columns / kStepColumns, 0);
  for (std::int64_t part = 0; part < cut.parts; ++part)
    for (std::int64_t piece = 0; piece < cut.pieces; ++piece)
      for (std::int32_t warp = 0; warp < kConsumerWarps; ++warp)
        for (std::int32_t i = 0; i < cut.iterations; ++i) {
          const std::int32_t step = warp * cut.iterations + i;
          if (step >= cut.piece_steps()) continue;
          const std::int64_t column =
              part * cut.part_columns() + piece * cut.piece_columns() + step * kStepColumns;
          ++times.at(column / kStepColumns);
        }
  return times;
}

class StreamPlanOfSize : public testing::TestWithParam<Size> {
 protected:
  ModelConfig config = config_of(GetParam());
  StreamPlan plan = make_stream_plan(config, make_decode_plan(config, kHopper).kv, kHopper);
  std::vector<const ProductCut*> products() const {
    return {&plan.qkv, &plan.mlp_up, &plan.mlp_down, &plan.attention_out, &plan.lm_head};
  }
};

TEST_P(StreamPlanOfSize, MultipliesEveryColumnOnce) {
  for (const ProductCut* cut : products()) {
    const auto times = times_multiplied(*cut);
    EXPECT_EQ(std::count(times.begin(), times.end(), 1), std::ssize(times));
    EXPECT_LE(cut->iterations, kMaxPieceIterations);
    EXPECT_LE(cut->pieces, plan.pieces);
  }
}

TEST_P(StreamPlanOfSize, HasEveryRowInOneChunk) {
  for (const ProductCut* cut : products()) {
    EXPECT_GE(std::int64_t{cut->chunks} * kChunkRows, cut->rows);
    EXPECT_LT(std::int64_t{cut->chunks - 1} * kChunkRows, cut->rows);
  }
}

// All rows of one sequence, as many of them in a task as can be.
TaskExtent one_sequence(std::int32_t rows, std::int64_t head_dim) {
  return {std::min(rows, max_task_queries(head_dim)), std::min(rows, kMaxSequenceRows)};
}

TEST_P(StreamPlanOfSize, CopiesByMultiplesOfSixteenBytes) {
  for (const ProductCut* cut : products()) {
    EXPECT_EQ(cut->piece_columns() * 2 % 16, 0);
    EXPECT_EQ(cut->row_pitch() % 16, 0);
    EXPECT_GE(cut->row_pitch(), cut->piece_columns() * 2);
    // Lanes 8 j to 8 j + 7 load 64 bytes of each of two rows, in one go if all banks differ.
    EXPECT_EQ(cut->row_pitch() % 128, 64);
  }
}

TEST_P(StreamPlanOfSize, FitsForEveryNumberOfRows) {
  EXPECT_LE(plan.mlp_down.parts + plan.attention_out.parts, kMaxResidualParts);
  EXPECT_EQ(plan.qkv.parts, 1);
  EXPECT_EQ(plan.mlp_up.parts, 1);
  EXPECT_EQ(plan.lm_head.parts, 1);
  for (const ProductCut* cut : products()) EXPECT_LE(cut->stage_bytes(), plan.data_bytes);
  EXPECT_LE(plan.kv.block_bytes, plan.data_bytes);
  for (std::int32_t rows = 1; rows <= kMaxRows; ++rows)
    for (const TaskExtent& extent : {TaskExtent{}, TaskExtent{std::min(rows, kQuadQueries), rows},
                                     one_sequence(rows, config.head_dim)}) {
      const StreamMemory memory = stream_memory(plan, config, kHopper, rows, extent);
      EXPECT_LE(memory.shared_bytes, kHopper.shared_bytes_per_block);
      EXPECT_EQ(memory.shared_bytes,
                kStreamControlBytes + memory.scratch_bytes + memory.stages * plan.stage_bytes);
      EXPECT_GT(memory.stages, plan.pieces) << "a chunk is read while another one lands";
      EXPECT_GE(operand_rows(rows), rows);
      EXPECT_GE(memory.scratch_bytes,
                std::int64_t{kPartialBuffers} * kConsumerWarps * rows * kChunkRows * 4);
      EXPECT_GE(memory.task_slots, 1);
      EXPECT_LE(memory.task_slots, kMaxTaskSlots);
      EXPECT_LE(memory.tasks_offset + std::int64_t{memory.task_slots} * memory.task.bytes,
                memory.scratch_bytes);
      EXPECT_EQ(memory.tasks_offset % 16, 0);
      const std::int64_t others =
          std::max(std::int64_t{kPartialBuffers} * kConsumerWarps * rows * kChunkRows * 4,
                   rows == 1 ? 2 * config.hidden_size * 2 : 0);
      if (memory.keeps_tasks) {
        EXPECT_GE(memory.tasks_offset, others);
      }
      if (memory.keeps_inputs) {
        EXPECT_GE(memory.tasks_offset + memory.task.queries, others);
      }
      EXPECT_TRUE(memory.keeps_inputs || !memory.keeps_tasks);
    }
}

TEST_P(StreamPlanOfSize, KeepsWhatATaskHasApart) {
  for (const TaskExtent& extent :
       {TaskExtent{}, TaskExtent{1, 7}, TaskExtent{5, 5}, one_sequence(2, config.head_dim),
        one_sequence(kMaxRows, config.head_dim)}) {
    const TaskLayout memory = task_layout(config.head_dim, extent);
    EXPECT_EQ(memory.queries, extent.queries * kConsumerWarps * (config.head_dim + 2) * 4);
    // Two quads lie together, if there is more than one.
    const std::int32_t held = extent.queries <= 4 ? extent.queries : extent.queries <= 8 ? 8 : 16;
    EXPECT_EQ(memory.fresh - memory.queries, held * 2 * config.head_dim * 2);
    EXPECT_EQ(memory.bytes - memory.fresh, extent.sequence_rows * 2 * config.head_dim * 2);
    // Matrices are loaded by rows of 16 bytes.
    EXPECT_EQ(memory.queries % 16, 0);
    EXPECT_EQ(memory.fresh % 16, 0);
    EXPECT_EQ(memory.bytes % 16, 0);
  }
}

TEST_P(StreamPlanOfSize, FitsOnEachChipOrIsRefused) {
  for (const auto& [name, limits] : kChips) {
    SCOPED_TRACE(name);
    const bool is_large = limits.shared_bytes_per_block >= kHopper.shared_bytes_per_block;
    try {
      const StreamPlan there = make_stream_plan(config, plan.kv, limits);
      for (const std::int32_t rows : {1, 8, 16, kMaxRows}) {
        const StreamMemory memory =
            stream_memory(there, config, limits, rows, one_sequence(rows, config.head_dim));
        EXPECT_LE(memory.shared_bytes, limits.shared_bytes_per_block);
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      EXPECT_FALSE(is_large) << error.what();
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, StreamPlanOfSize, testing::ValuesIn(kSizes), [](const auto& info) {
  std::string name = info.param.name;
  std::replace(name.begin(), name.end(), '.', '_');
  return name;
});

// A group of rows has at most one task of attention for each SM.
TEST(StreamPlan, RefusesMoreHeadsThanSms) {
  const ModelConfig config = config_of(kSizes[0]);
  const KvPlan kv = make_decode_plan(config, kHopper).kv;
  DeviceLimits limits = kHopper;
  limits.sm_count = static_cast<std::int32_t>(config.num_heads);
  EXPECT_NO_THROW(make_stream_plan(config, kv, limits));
  --limits.sm_count;
  try {
    make_stream_plan(config, kv, limits);
    FAIL() << "made a plan";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::unsupported);
    EXPECT_NE(std::string(error.what()).find("as many heads as there are SMs"), std::string::npos);
  }
}

TEST(StreamPlan, RefusesColumnsThatAreNoMultipleOf32) {
  const ModelConfig good = config_of(kSizes[0]);
  const KvPlan kv = make_decode_plan(good, kHopper).kv;
  ModelConfig config = good;
  config.intermediate_size = 520;
  try {
    make_stream_plan(config, kv, kHopper);
    FAIL() << "made a plan";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::unsupported);
    EXPECT_NE(std::string(error.what()).find("the second MLP matrix [128, 520]"), std::string::npos)
        << error.what();
  }
}

TEST(StreamPlan, RefusesTooLittleSharedMemory) {
  const ModelConfig config = config_of(kSizes[7]);
  const KvPlan kv = make_decode_plan(config, kHopper).kv;
  try {
    make_stream_plan(config, kv, {132, 64 * 1024});
    FAIL() << "made a plan";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::unsupported);
    EXPECT_NE(std::string(error.what()).find("the device has 65536"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace clusterfusion::plan
