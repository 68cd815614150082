#include "plan/decode_plan.hpp"

#include <algorithm>
#include <optional>

#include "base/fail.hpp"

namespace clusterfusion::plan {
namespace {

// Bulk copies of about this size keep memory busy with two of them in flight for each SM; smaller
// ones are bound by the rate of tickets, larger ones widen the skew at a phase's end.
constexpr std::int64_t kTargetChunkBytes = 25600;
// Registers: a lane holds `iterations` 16-byte fragments of activations for a matrix.
constexpr std::int32_t kMaxIterations = 10;
constexpr std::int64_t kSumBytes = 16384;

// The cut with the largest chunk up to `limit_bytes` that gives every warp the same work; of
// equals, the one with the fewest segments (fewest sums).
std::optional<MatrixPlan> cut(std::int64_t rows, std::int64_t columns, std::int64_t limit_bytes) {
  std::optional<MatrixPlan> best;
  for (std::int32_t unit_rows : {1, 2, 4, 8}) {
    for (std::int32_t segments : {1, 2, 4, 8}) {
      const std::int64_t step = static_cast<std::int64_t>(segments) * (8 / unit_rows) * 32;
      if (columns % step != 0 || columns / step > kMaxIterations) continue;
      const std::int64_t rows_step = unit_rows * kConsumerWarps / segments;
      const std::int64_t steps = limit_bytes / (rows_step * columns * 2);
      if (steps < 1) continue;
      MatrixPlan plan;
      plan.rows = rows;
      plan.columns = columns;
      plan.unit_rows = unit_rows;
      plan.segments = segments;
      plan.iterations = static_cast<std::int32_t>(columns / step);
      plan.rows_per_chunk = static_cast<std::int32_t>(steps * rows_step);
      plan.chunks =
          static_cast<std::int32_t>((rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk);
      if (!best || plan.chunk_bytes() > best->chunk_bytes()) best = plan;
    }
    if (best) break;  // more rows in a unit only where the columns need it
  }
  return best;
}

MatrixPlan cut_or_fail(const char* name, std::int64_t rows, std::int64_t columns) {
  // A row may be wider than the target: then a chunk is as small as the warps allow.
  for (std::int64_t limit = kTargetChunkBytes; limit <= 4 * kTargetChunkBytes; limit *= 2) {
    if (const auto plan = cut(rows, columns, limit)) return *plan;
  }
  fail(ErrorKind::unsupported,
       "the streaming decode kernel cannot cut {} [{}, {}]: the number of columns must be a "
       "multiple "
       "of 32 (of 256 above 2560) and at most 20480; run this model on the CPU (device \"cpu\")",
       name, rows, columns);
}

KvPlan plan_kv(const ModelConfig& config, std::int64_t stage_bytes) {
  require(config.head_dim % 16 == 0 && config.head_dim <= 256, ErrorKind::unsupported,
          "the streaming decode kernel needs a head size that is a multiple of 16 and at most 256, "
          "found {}; run this model on the CPU (device \"cpu\")",
          config.head_dim);
  KvPlan kv;
  kv.block_positions = kKvPagePositions;
  while (kv.block_positions * config.head_dim * 4 > stage_bytes) kv.block_positions /= 2;
  kv.block_bytes = kv.block_positions * config.head_dim * 4;
  kv.head_bytes = kKvPagePositions * config.head_dim * 4;
  kv.page_bytes = kv.head_bytes * config.num_heads * config.num_layers;
  return kv;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

DecodePlan make_decode_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const std::int64_t hidden = config.hidden_size;
  DecodePlan plan;
  plan.qkv = cut_or_fail("the QKV matrix", 3 * hidden, hidden);
  plan.attention_out = cut_or_fail("the attention output matrix", hidden, hidden);
  plan.mlp_up = cut_or_fail("the first MLP matrix", config.intermediate_size, hidden);
  plan.mlp_down = cut_or_fail("the second MLP matrix", hidden, config.intermediate_size);
  plan.lm_head = cut_or_fail("the LM head", config.vocab_size, hidden);
  for (const MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head}) {
    plan.stage_bytes = std::max(plan.stage_bytes, round_up(matrix->chunk_bytes(), 128));
  }
  plan.kv = plan_kv(config, plan.stage_bytes);
  plan.sum_slots = kSumBytes / 4;
  const std::int64_t fixed = kControlBytes + kSumBytes + round_up(hidden * 4, 128);
  plan.stages = static_cast<std::int32_t>(
      std::min<std::int64_t>(16, (limits.shared_bytes_per_block - fixed) / plan.stage_bytes));
  require(plan.stages >= 2, ErrorKind::unsupported,
          "the streaming decode kernel needs {} bytes of shared memory a block for hidden size {}, "
          "the device has {}; run this model on the CPU (device \"cpu\")",
          fixed + 2 * plan.stage_bytes, hidden, limits.shared_bytes_per_block);
  plan.shared_bytes = fixed + plan.stages * plan.stage_bytes;
  return plan;
}

}  // namespace clusterfusion::plan
