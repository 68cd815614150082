// What the streaming kernels are told of a plan. These tests need no GPU.
#include <gtest/gtest.h>

#include "backend/cuda/decode/decode_setup.hpp"
#include "gpu_fixture.hpp"
#include "plan/decode_plan.hpp"

namespace clusterfusion::test {
namespace {

constexpr int kSmCount = 132;
constexpr std::int64_t kSharedBytes = 232448;

class StreamParams : public testing::TestWithParam<Shape> {
 protected:
  static cuda::DecodeParams params(bool packed_operands) {
    const ModelConfig config = config_of(GetParam());
    return cuda::stream_params(config, plan::make_decode_plan(config, {kSmCount, kSharedBytes}),
                               kSmCount, packed_operands);
  }
};

// Else callers that set max_in_flight would be overruled late in a phase, which may be all of it.
TEST_P(StreamParams, ReadNoMoreAtOnceUnlessAskedFor) {
  const cuda::DecodeParams by_itself = params(true);
  EXPECT_EQ(by_itself.late_percent, 100);
  EXPECT_EQ(by_itself.busy_in_flight, 0);
  cuda::DecodeParams plain = by_itself, any = by_itself;
  cuda::read_more_at_once(plain, plan::LayerKind::plain);
  EXPECT_LT(plain.late_percent, 100);
  EXPECT_GE(plain.late_in_flight, plain.max_in_flight);
  EXPECT_LE(plain.late_in_flight, plain.stages);
  EXPECT_EQ(plain.busy_in_flight, 0);
  cuda::read_more_at_once(any, plan::LayerKind::any);
  EXPECT_EQ(any.late_percent, 100);
  EXPECT_GE(any.busy_in_flight, any.max_in_flight);
  EXPECT_LE(any.busy_in_flight, any.stages);
}

// The lanes of a row share all of its sums, and a row's lanes lie in one warp.
TEST_P(StreamParams, SpreadTheSumsOfARow) {
  for (const bool half : {false, true}) {
    const cuda::DecodeParams told = params(half);
    for (const cuda::StreamedMatrix& matrix :
         {told.qkv, told.attention_out, told.mlp_up, told.mlp_down, told.lm_head}) {
      EXPECT_EQ(matrix.rows_per_chunk << (matrix.row_lanes_log2 + matrix.lane_sums_log2),
                matrix.sums_per_chunk);
      EXPECT_GE(matrix.row_lanes_log2, 0);
      EXPECT_LE(matrix.row_lanes_log2, 5);
      EXPECT_GE(matrix.lane_sums_log2, 0);
      EXPECT_LE(matrix.lane_sums_log2, 3);  // two loads of four
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, StreamParams, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
