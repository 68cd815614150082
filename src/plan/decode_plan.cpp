#include "plan/decode_plan.hpp"

#include <algorithm>
#include <optional>
#include <span>

#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::plan {
namespace {

// Bulk copies of about this size keep memory busy with two of them in flight for each SM; smaller
// ones are bound by the rate of tickets, larger ones widen the skew at a phase's end. Matrices that
// are too small for that are cut finer, so that each SM gets a share.
constexpr std::int64_t kTargetChunkBytes = 20480;
// Chunks of a row for each warp may be as large as this: results that cross between SMs wait behind
// the copies of larger ones.
constexpr std::int64_t kLargestChunkBytes = 28 * 1024;
// A ring stage has room for this much of a KV page, or for all of it.
constexpr std::int64_t kMinKvBlockBytes = 16384;
constexpr std::int64_t kMaxHeadDim = 256;
static_assert(kMinKvBlockBytes >= kMinKvBlockPositions * kMaxHeadDim * 4);
// Registers: a lane holds `iterations` 16-byte fragments of activations for a matrix.
constexpr std::int32_t kGoodIterations = kNarrowFragments;
constexpr std::int32_t kMaxIterations = kWideFragments;
// Of wider models narrow kernels do not hold the residual stream: a pair of elements a fragment.
constexpr std::int64_t kNarrowHidden = kConsumerThreads * 2 * kNarrowFragments;
// Partial sums: enough for most of what one SM multiplies in a phase, of layers of any kind for
// half of it, since a longer ring gains more there; what the ring leaves over is added.
constexpr std::int64_t kMinSumSlots = 2048, kMinSumSlotsOfAny = 1536;
constexpr std::int64_t kMaxSumSlots = 8192;
// Of the ring: one is filled while another is read.
constexpr std::int32_t kMinDecodeStages = 2;

// Whether the kernel for such layers has code for rows whose last slices are shorter.
bool takes_ragged(const LayerSpec& spec) { return layer_kind(spec) == LayerKind::any; }

// Whether it takes rows of such a matrix in two stages. Rows of the hidden size never are so wide
// where a kernel holds the residual stream, and two of a gated MLP's lie in a chunk.
bool in_two_stages(const LayerSpec& spec, std::int64_t columns) {
  return layer_kind(spec) == LayerKind::any && columns != spec.hidden_size &&
         columns * 2 > kTargetChunkBytes;
}

// How rows become chunks.
struct ChunkRule {
  std::int64_t target_bytes = 0;
  bool even = false;     // of a gated MLP: half of them are the gate's
  bool by_four = false;  // three or more rows become fours, which take packed operands
  bool ragged = false;   // the last slices of a row may be shorter
  bool two_stages = false;

  std::int64_t rounded(std::int64_t rows) const {
    if (by_four && rows >= 3) return std::max<std::int64_t>(rows / 4, 1) * 4;
    return even ? std::max<std::int64_t>(rows / 2, 1) * 2 : rows;
  }
};

ChunkRule rule_of(const LayerSpec& spec, std::int64_t columns, std::int64_t target_bytes) {
  return {.target_bytes = target_bytes,
          .by_four = layer_kind(spec) == LayerKind::any && spec.hidden_size > kNarrowHidden,
          .ragged = takes_ragged(spec),
          .two_stages = in_two_stages(spec, columns)};
}

// A row in two stages, if `max_iterations` fragments are enough.
std::optional<MatrixPlan> cut_in_two_stages(std::int64_t rows, std::int64_t columns,
                                            std::int32_t max_iterations) {
  constexpr std::int64_t kStep = kConsumerWarps * 8 * 32;
  const auto iterations = static_cast<std::int32_t>((columns + kStep - 1) / kStep);
  if (iterations > max_iterations) return std::nullopt;
  MatrixPlan plan;
  plan.rows = rows;
  plan.columns = columns;
  plan.unit_rows = plan.rows_per_chunk = 1;
  plan.segments = kConsumerWarps;
  plan.iterations = iterations;
  plan.stages = 2;
  plan.chunks = static_cast<std::int32_t>(rows);
  return plan;
}

// The cut with the fewest segments (fewest sums) that holds at most `max_iterations` fragments.
std::optional<MatrixPlan> cut(std::int64_t rows, std::int64_t columns, std::int32_t max_iterations,
                              const ChunkRule& rule) {
  if (rule.two_stages) return cut_in_two_stages(rows, columns, max_iterations);
  // More rows in a unit only where the columns need it.
  for (std::int32_t unit_rows : {1, 2, 4, 8}) {
    for (std::int32_t segments : {1, 2, 4, 8}) {
      const std::int64_t step = static_cast<std::int64_t>(segments) * (8 / unit_rows) * 32;
      const std::int64_t iterations = (columns + step - 1) / step;
      if ((columns % step != 0 && !rule.ragged) || iterations > max_iterations) continue;
      MatrixPlan plan;
      plan.rows = rows;
      plan.columns = columns;
      plan.unit_rows = unit_rows;
      plan.segments = segments;
      plan.iterations = static_cast<std::int32_t>(iterations);
      // A row may be wider than the target.
      std::int64_t units = std::max<std::int64_t>(rule.target_bytes / (unit_rows * columns * 2), 1);
      // One for each warp, where the chunk does not become much smaller by that.
      const std::int64_t warps = kConsumerWarps / segments;
      if (units > warps && 4 * warps >= 3 * units) units = warps;
      if (rule.by_four && units < warps && warps * unit_rows * columns * 2 <= kLargestChunkBytes)
        units = warps;
      if (unit_rows == 1) units = rule.rounded(units);
      plan.rows_per_chunk = static_cast<std::int32_t>(units) * unit_rows;
      plan.chunks =
          static_cast<std::int32_t>((rows + plan.rows_per_chunk - 1) / plan.rows_per_chunk);
      return plan;
    }
  }
  return std::nullopt;
}

MatrixPlan cut_or_fail(const char* name, std::int64_t rows, std::int64_t columns,
                       const ChunkRule& rule) {
  ChunkRule exact = rule;
  exact.ragged = false;
  for (const ChunkRule& tried : {exact, rule})
    for (const std::int32_t iterations : {kGoodIterations, kMaxIterations})
      if (const auto plan = cut(rows, columns, iterations, tried)) return *plan;
  fail(ErrorKind::unsupported,
       "the streaming decode kernel cannot cut {} [{}, {}]: the number of columns must be one to "
       "ten times a power of two of 32 to 2048; run this model on the CPU (device \"cpu\")",
       name, rows, columns);
}

// The numbers of iterations that kernels have code for with packed operands, of one chunk and of
// two.
std::span<const std::int32_t> packed_iterations(bool is_wide) {
  constexpr static std::int32_t kNarrow[] = {4, 5}, kWide[] = {4, 6, 8, 10};
  return is_wide ? std::span<const std::int32_t>(kWide) : kNarrow;
}
std::span<const std::int32_t> packed_pair_iterations() {
  constexpr static std::int32_t kBoth[] = {8, 10};
  return kBoth;
}

bool can_cut(const LayerSpec& spec, std::int64_t columns) {
  return cut(1, columns, kMaxIterations, rule_of(spec, columns, kTargetChunkBytes)).has_value();
}

bool can_attend(std::int64_t head_dim) { return head_dim % 16 == 0 && head_dim <= kMaxHeadDim; }

// Whole pages in one block.
KvPlan plan_pages(const ModelConfig& config, DType dtype) {
  require(
      can_attend(config.head_dim), ErrorKind::unsupported,
      "attention on the GPU needs a head size that is a multiple of 16 and at most {}, found {}; "
      "run this model on the CPU (device \"cpu\")",
      kMaxHeadDim, config.head_dim);
  KvPlan kv;
  kv.block_positions = kKvPagePositions;
  kv.dtype = dtype;
  kv.block_bytes = kKvPagePositions * config.head_dim * 2 * size_of(dtype);
  kv.head_bytes = kv.block_bytes;
  kv.page_bytes = kv.head_bytes * config.kv_heads() * config.num_layers;
  return kv;
}

// Blocks of 16-bit elements that fit into a ring stage.
KvPlan plan_kv(const ModelConfig& config, std::int64_t stage_bytes) {
  KvPlan kv = plan_pages(config, DType::float16);
  kv.dtype = config.dtype;
  while (kv.block_bytes > stage_bytes) {
    kv.block_positions /= 2;
    kv.block_bytes /= 2;
  }
  return kv;
}

// All but the share of the sums in what the ring leaves over: with the fewest of them, and as many
// stages as fit then, which may be too few.
DecodePlan draft_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const std::int64_t hidden = config.hidden_size;
  std::int64_t widest_row = 0;  // in one stage
  for (const std::int64_t columns : {hidden, config.intermediate_size, config.attention_size()})
    if (!in_two_stages(config, columns)) widest_row = std::max(widest_row, columns * 2);
  const auto cut_matrix = [&](const char* name, std::int64_t rows, std::int64_t columns,
                              bool even = false) {
    const std::int64_t share = rows * columns * 2 / limits.sm_count;
    const std::int64_t target = std::min(std::max(kTargetChunkBytes, widest_row), share);
    ChunkRule rule = rule_of(config, columns, target);
    rule.even = even;
    return cut_or_fail(name, rows, columns, rule);
  };
  DecodePlan plan;
  plan.kind = layer_kind(config);
  plan.qkv = cut_matrix("the QKV matrix", config.qkv_size(), hidden);
  plan.attention_out = cut_matrix("the attention output matrix", hidden, config.attention_size());
  plan.mlp_up = cut_matrix("the first MLP matrix", mlp_up_rows(config), hidden, config.gated_mlp);
  plan.mlp_down = cut_matrix("the second MLP matrix", hidden, config.intermediate_size);
  plan.lm_head = cut_matrix("the LM head", config.vocab_size, hidden);
  for (const MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head}) {
    plan.data_bytes = std::max(plan.data_bytes, round_up(matrix->stage_bytes(), 128));
  }
  const std::int64_t page_bytes = kKvPagePositions * config.head_dim * 4;
  plan.data_bytes = std::max(plan.data_bytes, std::min(page_bytes, kMinKvBlockBytes));
  plan.kv = plan_kv(config, plan.data_bytes);
  // Bulk copies begin and end at multiples of 16 bytes.
  std::int64_t bias_bytes = 0;
  for (const MatrixPlan* matrix : {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down})
    bias_bytes = std::max<std::int64_t>(bias_bytes, matrix->rows_per_chunk * 4 + 2 * 16);
  plan.stage_bytes = plan.data_bytes + round_up(bias_bytes, 128);
  plan.input_bytes = round_up(normed_inputs(config) * hidden * 2, 128);
  const bool is_any = plan.kind == LayerKind::any;
  std::int64_t sum_slots = std::max(is_any ? kMinSumSlotsOfAny : kMinSumSlots,
                                    attention_floats(config) - (is_any ? plan.input_bytes / 4 : 0));
  for (const MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head})
    sum_slots = std::max<std::int64_t>(sum_slots, matrix->sums_per_chunk());
  plan.sum_slots = static_cast<std::int32_t>(round_up(sum_slots, 32));
  const std::int64_t room =
      limits.shared_bytes_per_block - kControlBytes - plan.input_bytes - plan.sum_slots * 4;
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
  if (layer_kind(spec) == LayerKind::any && spec.rotary_dim % 8 != 0)
    return "a rotation of dimensions that are no multiple of 8";
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

MatrixPlan with_packed_operands(MatrixPlan plan, std::int32_t fragments) {
  const bool is_wide = fragments > kNarrowFragments;
  const bool one_unit = plan.units_per_chunk() * plan.segments == kConsumerWarps;
  if (plan.mapping != MmaMapping::two_pass || plan.unit_rows != 1 || plan.stages != 1 ||
      !(one_unit || is_wide))
    return plan;
  MatrixPlan packed = plan;
  // A half of the columns of two rows, or a quarter of those of four; each warp has one unit.
  packed.mapping = plan.rows_per_chunk == 1 ? MmaMapping::packed_pairs : MmaMapping::packed;
  if (plan.rows_per_chunk % 2 == 0) packed.unit_rows = plan.rows_per_chunk % 4 == 0 ? 4 : 2;
  const std::int32_t units = packed.units_per_chunk();
  if (kConsumerWarps % units != 0 || (plan.rows_per_chunk > 1 && packed.unit_rows == 1))
    return plan;
  packed.segments = kConsumerWarps / units;
  const std::int64_t step = std::int64_t{packed.segments} * packed.slices() * 32;
  if (plan.columns % step != 0) return plan;
  packed.iterations = static_cast<std::int32_t>(plan.columns / step);
  const bool in_pairs = packed.mapping == MmaMapping::packed_pairs;
  for (const std::int32_t known : in_pairs ? packed_pair_iterations() : packed_iterations(is_wide))
    if (packed.iterations == known && (in_pairs || known <= fragments)) return packed;
  return plan;
}

DecodePlan make_decode_plan(const ModelConfig& config, const DeviceLimits& limits) {
  const std::string unstreamed = unstreamed_because(config);
  require(unstreamed.empty(), ErrorKind::internal, "the streaming decode kernel has no {}",
          unstreamed);
  DecodePlan plan = draft_plan(config, limits);
  const std::int64_t fixed = kControlBytes + plan.input_bytes;  // beside the sums and the ring
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

KvPlan make_page_plan(const ModelConfig& config, DType dtype) { return plan_pages(config, dtype); }

bool can_stream(const ModelConfig& config, const DeviceLimits& limits) {
  return unstreamed_because(config).empty() && can_cut(config, config.hidden_size) &&
         can_cut(config, config.attention_size()) && can_cut(config, config.intermediate_size) &&
         can_attend(config.head_dim) && draft_plan(config, limits).stages >= kMinDecodeStages;
}

std::string unstreamed_because(const ModelConfig& config, const DeviceLimits& limits) {
  const std::string of_layer = unstreamed_because(config);
  if (!of_layer.empty() || can_stream(config, limits)) return of_layer;
  return "sizes that no kernel streams";
}

}  // namespace clusterfusion::plan
