#include "backend/cuda/decode/decode_setup.hpp"

#include <algorithm>
#include <bit>

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::cuda {
namespace {

// Time enough to draw a ticket while a copy lands. More would be drawn too early to even out what
// one SM takes longer for than another.
constexpr int kAnnouncedAhead = 1;
constexpr int kTicketChunks = 2;

StreamedMatrix streamed(plan::MatrixPlan plan, std::int32_t sum_slots, int packed_fragments) {
  if (packed_fragments > 0) plan = plan::with_packed_operands(plan, packed_fragments);
  StreamedMatrix matrix{};
  matrix.rows = static_cast<std::int32_t>(plan.rows);
  matrix.rows_per_chunk = plan.rows_per_chunk;
  matrix.chunks = plan.chunks;
  matrix.unit_rows = plan.unit_rows;
  matrix.units_per_chunk = plan.units_per_chunk();
  matrix.sums_per_chunk = plan.sums_per_chunk();
  matrix.segments = plan.segments;
  matrix.segments_log2 = std::countr_zero(static_cast<unsigned>(plan.segments));
  matrix.slices_log2 = std::countr_zero(static_cast<unsigned>(plan.slices()));
  const int row_sums_log2 = matrix.segments_log2 + matrix.slices_log2;
  matrix.lane_sums_log2 = std::max(matrix.slices_log2, std::min(2, row_sums_log2));
  matrix.row_lanes_log2 = row_sums_log2 - matrix.lane_sums_log2;
  matrix.slice_columns = static_cast<std::int32_t>(plan.slice_columns());
  matrix.segment_columns = static_cast<std::int32_t>(plan.segment_columns());
  matrix.row_bytes = static_cast<std::int32_t>(plan.row_bytes());
  if (plan.stages == 2)
    matrix.first_stage_bytes = static_cast<std::int32_t>(plan.first_stage_columns() * 2);
  matrix.iterations = plan.iterations;
  matrix.swaps = plan.slice_columns() % 64 == 0 && plan.iterations % 2 == 0 && !plan.is_ragged();
  matrix.mapping = plan.mapping;
  matrix.max_slots = std::min(kMaxChunkSlots, sum_slots / plan.sums_per_chunk());
  const auto rows = static_cast<std::uint32_t>(plan.rows_per_chunk);
  matrix.rows_reciprocal = static_cast<std::uint32_t>(((std::uint64_t{1} << 32) + rows - 1) / rows);
  return matrix;
}

LamportLayout lamport_layout(const ModelConfig& config, std::int32_t sm_count) {
  const std::int64_t tasks = std::max<std::int64_t>(sm_count, config.kv_heads());
  const std::int64_t group = config.num_heads / config.kv_heads();
  LamportLayout layout{};
  const auto take = [&](std::int64_t bytes) {
    const std::int32_t offset = layout.bytes;
    layout.bytes += static_cast<std::int32_t>(round_up(bytes, 256));
    return offset;
  };
  layout.qkv = take(config.qkv_size() * 4);
  layout.mlp = take(config.intermediate_size * 2);
  layout.attention = take(config.attention_size() * 2);
  layout.delta_attention = take(config.hidden_size * 4);
  layout.delta_mlp = take(config.hidden_size * 4);
  layout.partials = take(tasks * group * (config.head_dim + 2) * 4);
  layout.candidates = take(sm_count * static_cast<std::int64_t>(sizeof(Candidate)));
  return layout;
}

}  // namespace

DecodeParams stream_params(const ModelConfig& config, const plan::DecodePlan& plan,
                           std::int32_t sm_count, int packed_fragments) {
  DecodeParams p{};
  const auto matrix = [&](const plan::MatrixPlan& its) {
    return streamed(its, plan.sum_slots, packed_fragments);
  };
  p.qkv = matrix(plan.qkv);
  p.attention_out = matrix(plan.attention_out);
  p.mlp_up = matrix(plan.mlp_up);
  p.mlp_down = matrix(plan.mlp_down);
  p.lm_head = matrix(plan.lm_head);
  set_shape(p, config, plan.kv);
  p.num_kv_heads = static_cast<std::int32_t>(config.kv_heads());
  p.head_group = p.num_heads / p.num_kv_heads;
  p.rms_norm = config.norm == NormKind::rms_norm;
  p.drawable_vocab_size = p.vocab_size;
  p.stages = plan.stages;
  p.stage_bytes = static_cast<std::int32_t>(plan.stage_bytes);
  p.bias_offset = static_cast<std::int32_t>(plan.data_bytes);
  p.input_bytes = static_cast<std::int32_t>(plan.input_bytes);
  p.bias_element_bytes = 4;
  p.sum_slots = plan.sum_slots;
  p.max_in_flight = std::min(kMaxInFlight, plan.stages);
  p.announced_ahead = kAnnouncedAhead;
  p.late_in_flight = p.max_in_flight;
  p.late_percent = 100;  // never
  p.long_static_percent = kStaticPercent;
  p.static_percent = kStaticPercent;
  p.ticket_chunks = kTicketChunks;
  p.layout = lamport_layout(config, sm_count);
  return p;
}

plan::DeviceLimits limits_of(const cudaDeviceProp& properties) {
  return {properties.multiProcessorCount,
          static_cast<std::int64_t>(properties.sharedMemPerBlockOptin)};
}

void read_more_at_once(DecodeParams& params, plan::LayerKind kind) {
  if (kind == plan::LayerKind::plain) {
    params.late_in_flight = std::min(kLateInFlight, params.stages);
    params.late_percent = kLatePercent;
  } else {
    params.busy_in_flight = std::min(kBusyInFlightOfAny, params.stages);
    params.long_static_percent = kLongStaticPercentOfAny;
  }
}

int fragments_needed(const ModelConfig& config, const plan::DecodePlan& plan) {
  // The residual stream is held in registers as well: a pair of elements for each fragment.
  constexpr std::int64_t kPairedElements = plan::kConsumerThreads * 2;
  int needed = static_cast<int>((config.hidden_size + kPairedElements - 1) / kPairedElements);
  for (const plan::MatrixPlan* matrix :
       {&plan.qkv, &plan.attention_out, &plan.mlp_up, &plan.mlp_down, &plan.lm_head})
    needed = std::max(needed, matrix->iterations);
  return needed;
}

void prepare_kernel(const void* kernel, const plan::DecodePlan& plan,
                    const cudaDeviceProp& properties) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(properties.sharedMemPerBlockOptin)),
        "reserving shared memory");
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kDecodeBlockThreads,
                                                      static_cast<std::size_t>(plan.shared_bytes)),
        "asking how many blocks fit");
  require(blocks >= 1, ErrorKind::unsupported,
          "a block of the streaming kernel ({} threads, {} bytes of shared memory) does not fit on "
          "an SM of this GPU; use device \"cpu\"",
          kDecodeBlockThreads, plan.shared_bytes);
}

}  // namespace clusterfusion::cuda
