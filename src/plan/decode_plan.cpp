#include "plan/decode_plan.hpp"

#include <algorithm>
#include <optional>

#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::plan {
namespace {

// Bulk copies of about this size keep memory busy with two of them in flight for each SM; smaller
// ones are bound by the rate of tickets, larger ones widen the skew at a phase's end. Matrices that
// are too small for that are cut finer, so that each SM gets a share.
constexpr std::int64_t kTargetChunkBytes = 20480;
// A ring stage has room for this much of a KV page, or for all of it.
constexpr std::int64_t kMinKvBlockBytes = 16384;
constexpr std::int64_t kMaxHeadDim = 256;
static_assert(kMinKvBlockBytes >= kMinKvBlockPositions * kMaxHeadDim * 4);
// Registers: a lane holds `iterations` 16-byte fragments of activations for a matrix.
constexpr std::int32_t kGoodIterations = 5;
constexpr std::int32_t kMaxIterations = 10;
// Partial sums: enough for most of what one SM multiplies in a phase; what the ring leaves over is
// added.
constexpr std::int64_t kMinSumSlots = 2048;
constexpr std::int64_t kMaxSumSlots = 8192;
// Of the ring: one is filled while another is read.
constexpr std::int32_t kMinDecodeStages = 2;

// The cut with the fewest segments (fewest sums) that holds at most `max_iterations` fragments. A
// chunk is a multiple of `multiple` rows, 1 or 2.
std::optional<MatrixPlan> cut(std::int64_t rows, std::int64_t columns, std::int32_t max_iterations,
                              std::int64_t target_bytes, std::int64_t multiple) {
  // More rows in a unit only where the columns need it.
  for (std::int32_t unit_rows : {1, 2, 4, 8}) {
    for (std::int32_t segments : {1, 2, 4, 8}) {
      const std::int64_t step = static_cast<std::int64_t>(segments) * (8 / unit_rows) * 32;
      if (columns % step != 0 || columns / step > max_iterations) continue;
      MatrixPlan plan;
      plan.rows = rows;
      plan.columns = columns;
      plan.unit_rows = unit_rows;
      plan.segments = segments;
      plan.iterations = static_cast<std::int32_t>(columns / step);
      // A row may be wider than the target.
      std::int64_t units = std::max<std::int64_t>(target_bytes / (unit_rows * columns * 2), 1);
      // One for each warp, where the chunk does not become much smaller by that.
      const std::int64_t warps = kConsumerWarps / segments;
      if (units > warps && 4 * warps >= 3 * units) units = warps;
      if (multiple > unit_rows) units = std::max(units / multiple, std::int64_t{1}) * multiple;
      plan.rows_per_chunk = static_cast<std::int32_t>(units) * unit_rows;
      plan.chunks =
          static_cast<std::int32_t>((rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk);
      return plan;
    }
  }
  return std::nullopt;
}

MatrixPlan cut_or_fail(const char* name, std::int64_t rows, std::int64_t columns,
                       std::int64_t target_bytes, std::int64_t multiple) {
  for (const std::int32_t iterations : {kGoodIterations, kMaxIterations})
    if (const auto plan = cut(rows, columns, iterations, target_bytes, multiple)) return *plan;
  fail(ErrorKind::unsupported,
       "the streaming decode kernel cannot cut {} [{}, {}]: the number of columns must be one to "
       "ten times a power of two of 32 to 2048; run this model on the CPU (device \"cpu\")",
       name, rows, columns);
}

bool can_cut(std::int64_t columns) {
  return cut(1, columns, kMaxIterations, kTargetChunkBytes, 1).has_value();
}

bool can_attend(std::int64_t head_dim) { return head_dim % 16 == 0 && head_dim <= kMaxHeadDim; }

KvPlan plan_kv(const ModelConfig& config, std::int64_t stage_bytes) {
  require(
      can_attend(config.head_dim), ErrorKind::unsupported,
      "attention on the GPU needs a head size that is a multiple of 16 and at most {}, found {}; "
      "run this model on the CPU (device \"cpu\")",
      kMaxHeadDim, config.head_dim);
  KvPlan kv;
  kv.block_positions = kKvPagePositions;
  while (kv.block_positions * config.head_dim * 4 > stage_bytes) kv.block_positions /= 2;
  kv.block_bytes = kv.block_positions * config.head_dim * 4;
  kv.head_bytes = kKvPagePositions * config.head_dim * 4;
  kv.page_bytes = kv.head_bytes * config.kv_heads() * config.num_layers;
  return kv;
}

// Shared memory beside the sums and the ring.
std::int64_t fixed_bytes(const ModelConfig& config) {
  return kControlBytes + round_up(config.hidden_size * 4, 128);
}

// All but the share of the sums in what the ring leaves over: with the fewest of them, and as many
// stages as fit then, which may be too few.
DecodePlan draft_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t widest_row =
      std::max({hidden, config.intermediate_size, config.attention_size()}) * 2;
  const auto cut_matrix = [&](const char* name, std::int64_t rows, std::int64_t columns,
                              std::int64_t multiple = 1) {
    const std::int64_t share = rows * columns * 2 / limits.sm_count;
    return cut_or_fail(name, rows, columns,
                       std::min(std::max(kTargetChunkBytes, widest_row), share), multiple);
  };
  DecodePlan plan;
  plan.qkv = cut_matrix("the QKV matrix", config.qkv_size(), hidden);
  plan.attention_out = cut_matrix("the attention output matrix", hidden, config.attention_size());
  plan.mlp_up = cut_matrix("the first MLP matrix", mlp_up_rows(config), hidden,
                           config.gated_mlp ? 2 : 1);
  plan.mlp_down = cut_matrix("the second MLP matrix", hidden, config.intermediate_size);
  plan.lm_head = cut_matrix("the LM head", config.vocab_size, hidden);
  for (const MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head}) {
    plan.data_bytes = std::max(plan.data_bytes, round_up(matrix->chunk_bytes(), 128));
  }
  const std::int64_t page_bytes = kKvPagePositions * config.head_dim * 4;
  plan.data_bytes = std::max(plan.data_bytes, std::min(page_bytes, kMinKvBlockBytes));
  plan.kv = plan_kv(config, plan.data_bytes);
  // Bulk copies begin and end at multiples of 16 bytes.
  std::int64_t bias_bytes = 0;
  for (const MatrixPlan* matrix : {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down})
    bias_bytes = std::max<std::int64_t>(bias_bytes, matrix->rows_per_chunk * 4 + 2 * 16);
  plan.stage_bytes = plan.data_bytes + round_up(bias_bytes, 128);
  std::int64_t sum_slots = std::max(kMinSumSlots, attention_sums(config));
  for (const MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head})
    sum_slots = std::max<std::int64_t>(sum_slots, matrix->sums_per_chunk());
  plan.sum_slots = static_cast<std::int32_t>(round_up(sum_slots, 32));
  const std::int64_t room =
      limits.shared_bytes_per_block - fixed_bytes(config) - plan.sum_slots * 4;
  plan.stages =
      static_cast<std::int32_t>(std::min<std::int64_t>(kMaxStages, room / plan.stage_bytes));
  return plan;
}

}  // namespace

std::string unbatched_because(const LayerSpec& spec) {
  if (spec.kv_heads() != spec.num_heads) return "grouped heads";
  if (spec.attention_size() != spec.hidden_size) return "heads not as wide as the hidden size";
  if (spec.norm != NormKind::layer_norm) return "RMSNorm";
  if (spec.gated_mlp) return "a gated MLP";
  if (spec.qk_norm) return "norms of queries and keys";
  return "";
}

std::string unstreamed_because(const LayerSpec& spec) {
  if (spec.num_heads > kMaxHeadGroup * spec.kv_heads())
    return fmt::format("groups of more than {} heads", kMaxHeadGroup);
  if (spec.gated_mlp && spec.mlp_bias) return "biases of a gated MLP";
  return "";
}

LayerKind layer_kind(const LayerSpec& spec) {
  return unbatched_because(spec).empty() ? LayerKind::plain : LayerKind::any;
}

std::string uncomputed_because(const LayerSpec& spec) {
  // Rows of activations and weights begin at multiples of 16 bytes.
  if (spec.hidden_size % 8 != 0) return "a hidden size that is no multiple of 8";
  if (spec.intermediate_size % 8 != 0) return "an MLP whose size is no multiple of 8";
  return "";
}

MatrixPlan with_packed_operands(MatrixPlan plan) {
  const bool one_unit = plan.units_per_chunk() * plan.segments == kConsumerWarps;
  // The kernel has code for these.
  const bool known = plan.iterations == 4 || plan.iterations == 5;
  if (plan.mapping != MmaMapping::two_pass || plan.unit_rows != 1 || !one_unit || !known)
    return plan;
  if (plan.rows_per_chunk % 2 == 0) {
    // A half of the columns of two rows, or a quarter of those of four.
    plan.mapping = MmaMapping::packed;
    plan.unit_rows = plan.rows_per_chunk % 4 == 0 ? 4 : 2;
    plan.segments *= plan.unit_rows;
  } else if (plan.rows_per_chunk == 1) {
    plan.mapping = MmaMapping::packed_pairs;
    plan.iterations *= 2;
  }
  return plan;
}

DecodePlan make_decode_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const std::string unstreamed = unstreamed_because(config);
  require(unstreamed.empty(), ErrorKind::internal, "the streaming decode kernel has no {}",
          unstreamed);
  DecodePlan plan = draft_plan(config, limits);
  const std::int64_t fixed = fixed_bytes(config);
  require(plan.stages >= kMinDecodeStages, ErrorKind::unsupported,
          "the streaming decode kernel needs {} bytes of shared memory a block for hidden size {}, "
          "the device has {}; run this model on the CPU (device \"cpu\")",
          fixed + plan.sum_slots * 4 + kMinDecodeStages * plan.stage_bytes, config.hidden_size,
          limits.shared_bytes_per_block);
  const std::int64_t left =
      (limits.shared_bytes_per_block - fixed - plan.stages * plan.stage_bytes) / 128 * 32;
  plan.sum_slots = std::max(plan.sum_slots,
                            static_cast<std::int32_t>(std::min<std::int64_t>(left, kMaxSumSlots)));
  plan.shared_bytes = fixed + plan.sum_slots * 4 + plan.stages * plan.stage_bytes;
  return plan;
}

KvPlan make_page_plan(const ModelConfig& config) {
  return plan_kv(config, kKvPagePositions * config.head_dim * 4);
}

bool can_stream(const ModelConfig& config, const DeviceLimits& limits) {
  return unstreamed_because(config).empty() && can_cut(config.hidden_size) &&
         can_cut(config.attention_size()) && can_cut(config.intermediate_size) && can_attend(config.head_dim) &&
         draft_plan(config, limits).stages >= kMinDecodeStages;
}

std::string unstreamed_because(const ModelConfig& config, const DeviceLimits& limits) {
  const std::string of_layer = unstreamed_because(config);
  if (!of_layer.empty() || can_stream(config, limits)) return of_layer;
  return "sizes that no kernel streams";
}

}  // namespace clusterfusion::plan
