#include "plan/stream_plan.hpp"

#include <algorithm>

#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::plan {
namespace {

// A part has at most so many columns, or as many as the hidden size: two pieces of five steps a
// warp, or four.
constexpr std::int64_t kPartColumns = 2560;
constexpr std::int64_t kWidePartColumns = 5120;
constexpr std::int64_t kMaxPieceColumns =
    std::int64_t{kConsumerWarps} * kMaxPieceIterations * kStepColumns;
constexpr std::int32_t kMinStreamStages = 4;

// The fewest equal shares of `steps`, at most `most` each.
std::int64_t shares(std::int64_t steps, std::int64_t most) {
  std::int64_t count = (steps + most - 1) / most;
  while (steps % count != 0) ++count;
  return count;
}

ProductCut cut(const char* name, std::int64_t rows, std::int64_t columns, std::int64_t part_columns,
               std::int64_t max_parts) {
  require(columns % kStepColumns == 0, ErrorKind::unsupported,
          "the streaming kernel cannot cut {} [{}, {}]: the number of columns must be a multiple "
          "of {}; run this model on the CPU (device \"cpu\")",
          name, rows, columns, kStepColumns);
  ProductCut result;
  result.rows = rows;
  result.columns = columns;
  result.parts =
      static_cast<std::int32_t>(shares(columns / kStepColumns, part_columns / kStepColumns));
  require(result.parts <= max_parts, ErrorKind::unsupported,
          "the streaming kernel cannot cut {} [{}, {}]: it needs {} parts of at most {} columns, "
          "at most {} are possible; run this model on the CPU (device \"cpu\")",
          name, rows, columns, result.parts, part_columns, max_parts);
  result.pieces = static_cast<std::int32_t>(
      shares(result.part_columns() / kStepColumns, kMaxPieceColumns / kStepColumns));
  result.iterations = (result.piece_steps() + kConsumerWarps - 1) / kConsumerWarps;
  result.chunks = static_cast<std::int32_t>((rows + kChunkRows - 1) / kChunkRows);
  return result;
}

}  // namespace

ProductCuts cut_products(const ModelConfig& config) {
  const std::string uncut = unbatched_because(config);
  require(uncut.empty(), ErrorKind::unsupported,
          "the kernels for many rows have no {}; run this model on the CPU (device \"cpu\")",
          uncut);
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t part =
      hidden <= kPartColumns ? kPartColumns : std::max(hidden, kWidePartColumns);
  ProductCuts cuts;
  cuts.qkv = cut("the QKV matrix", config.qkv_size(), hidden, part, 1);
  cuts.mlp_up = cut("the first MLP matrix", config.intermediate_size, hidden, part, 1);
  cuts.attention_out = cut("the attention output matrix", hidden, config.attention_size(), part, 1);
  // Parts as wide as the other matrices where that is possible.
  const bool even = hidden >= 1024 && config.intermediate_size % hidden == 0;
  cuts.mlp_down = cut("the second MLP matrix", hidden, config.intermediate_size,
                      even ? hidden : part, kMaxResidualParts - 1);
  cuts.lm_head = cut("the LM head", config.vocab_size, hidden, part, 1);
  return cuts;
}

StreamPlan make_stream_plan(const ModelConfig& config, const KvPlan& kv,
                            const DeviceLimits& limits) {
  StreamPlan plan{cut_products(config), kv};
  std::int32_t pieces = 0;
  for (const ProductCut* product :
       {&plan.qkv, &plan.mlp_up, &plan.attention_out, &plan.mlp_down, &plan.lm_head}) {
    plan.data_bytes = std::max(plan.data_bytes, round_up(product->stage_bytes(), 128));
    pieces = std::max(pieces, product->pieces);
  }
  plan.pieces = pieces <= 2 ? 2 : 4;
  require(pieces <= 4, ErrorKind::unsupported,
          "the streaming kernel takes {} ring stages for a row of this model, at most 4 are "
          "possible; run this model on the CPU (device \"cpu\")",
          pieces);
  plan.data_bytes = std::max(plan.data_bytes, round_up(kv.block_bytes, 128));
  plan.stage_bytes = plan.data_bytes + 128;
  require(config.num_heads <= limits.sm_count, ErrorKind::unsupported,
          "the streaming kernel takes as many heads as there are SMs, {}, found {}; run this model "
          "on the CPU (device \"cpu\")",
          limits.sm_count, config.num_heads);
  stream_memory(plan, config, limits, kMaxRows,
                {max_task_queries(config.head_dim), kMaxSequenceRows});
  return plan;
}

StreamMemory stream_memory(const StreamPlan& plan, const ModelConfig& config,
                           const DeviceLimits& limits, std::int32_t rows,
                           const TaskExtent& extent) {
  StreamMemory memory;
  const std::int64_t partials =
      std::int64_t{kPartialBuffers} * kConsumerWarps * rows * kChunkRows * 4;
  const std::int64_t normalised = rows == 1 ? 2 * config.hidden_size * 2 : 0;
  memory.task = task_layout(config.head_dim, extent);
  const std::int64_t others = round_up(std::max(partials, normalised), 128);
  const std::int64_t least = std::max(others, round_up(memory.task.bytes, 128));
  const std::int64_t room = limits.shared_bytes_per_block - kStreamControlBytes;
  memory.stages = static_cast<std::int32_t>(
      std::min<std::int64_t>(kMaxStages, (room - least) / plan.stage_bytes));
  require(memory.stages >= kMinStreamStages, ErrorKind::unsupported,
          "the streaming kernel needs {} bytes of shared memory a block for hidden size {}, the "
          "device has {}; run this model on the CPU (device \"cpu\")",
          kStreamControlBytes + least + kMinStreamStages * plan.stage_bytes, config.hidden_size,
          limits.shared_bytes_per_block);
  const std::int64_t left = room - memory.stages * plan.stage_bytes;
  memory.task_slots = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      left / memory.task.bytes, 1, std::min({rows, extent.tasks, kMaxTaskSlots})));
  const std::int64_t tasks = round_up(std::int64_t{memory.task_slots} * memory.task.bytes, 128);
  memory.keeps_tasks = others + tasks <= left;
  memory.tasks_offset = memory.keeps_tasks ? others : 0;
  memory.keeps_inputs = memory.keeps_tasks || memory.task.queries >= others;
  memory.scratch_bytes = std::max(least, memory.tasks_offset + tasks);
  memory.shared_bytes =
      kStreamControlBytes + memory.scratch_bytes + memory.stages * plan.stage_bytes;
  return memory;
}

}  // namespace clusterfusion::plan
