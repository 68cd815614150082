#include "backend/cuda/stream/stream_decoder.hpp"

#include <algorithm>
#include <cstddef>

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/stream/stream_kernel.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

// More copies under way make what the SMs tell each other wait behind them.
constexpr std::int32_t kMaxInFlight = 2;
// Late in a phase they may be more.
constexpr std::int32_t kLateInFlight = 3;
constexpr std::int32_t kLatePercent = 60;
// Time enough to draw a ticket while a copy lands.
constexpr std::int32_t kAnnouncedAhead = 2;
// A part of a phase is dealt round-robin, so that no ticket has to be waited for when it begins.
constexpr std::int32_t kStaticPercent = 30;
constexpr std::int32_t kTicketBytes = 40960;

StreamedProduct streamed(const plan::ProductCut& cut) {
  StreamedProduct product;
  product.rows = static_cast<std::int32_t>(cut.rows);
  product.parts = cut.parts;
  product.chunks = cut.chunks;
  product.pieces = cut.pieces;
  product.iterations = cut.iterations;
  product.piece_steps = cut.piece_steps();
  product.piece_bytes = static_cast<std::int32_t>(cut.piece_columns() * 2);
  product.part_bytes = static_cast<std::int32_t>(cut.part_columns() * 2);
  product.row_bytes = static_cast<std::int32_t>(cut.columns * 2);
  product.row_pitch = static_cast<std::int32_t>(cut.row_pitch());
  return product;
}

std::int32_t max_splits(const ModelConfig& config, std::int32_t sm_count) {
  return std::clamp(sm_count / static_cast<std::int32_t>(config.num_heads), 1, plan::kMaxSplits);
}

constexpr std::int32_t operand_index(std::int32_t operand_rows) {
  return operand_rows == 8 ? 0 : 1;
}

// Groups of rows of one sequence that share their attention: consecutive positions with the same
// splits.
std::vector<RowGroup> groups_of(std::span<const DecodeRow> rows, const ModelConfig& config,
                                const plan::KvPlan& kv, std::int32_t sm_count) {
  const auto split_length = [&](const DecodeRow& row) {
    return plan::attention_splits(static_cast<std::int32_t>(row.position + 1), kv.block_positions,
                                  static_cast<std::int32_t>(config.num_heads),
                                  static_cast<std::int32_t>(config.head_dim), sm_count);
  };
  std::vector<RowGroup> groups;
  std::int32_t sequence_first = 0;
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(rows.size()); ++i) {
    const bool same_sequence = i > 0 && rows[i].pages.data() == rows[i - 1].pages.data();
    if (!same_sequence) sequence_first = i;
    const auto splits = split_length(rows[i]);
    const bool shares = same_sequence && groups.back().rows < plan::kTaskQueries &&
                        split_length(rows[i - 1]).blocks_per_split == splits.blocks_per_split &&
                        split_length(rows[i - 1]).splits == splits.splits;
    if (shares)
      ++groups.back().rows;
    else
      groups.push_back({i, 1, sequence_first});
  }
  return groups;
}

}  // namespace

bool StreamDecoder::supports(const ModelConfig& config, const plan::KvPlan& kv,
                             const cudaDeviceProp& properties) {
  if (properties.major != 9) return false;
  try {
    const auto plan = plan::make_stream_plan(config, kv, limits_of(properties));
    return find_stream_kernel(config.dtype, 16, plan.pieces, config.head_dim) != nullptr;
  } catch (const Error&) {
    return false;
  }
}

StreamDecoder::StreamDecoder(const ModelConfig& config, const plan::KvPlan& kv,
                             const DeviceModel& weights, const cudaDeviceProp& properties,
                             std::int64_t max_positions, std::int32_t max_steps)
    : config_(config),
      plan_(plan::make_stream_plan(config, kv, limits_of(properties))),
      limits_(limits_of(properties)),
      max_steps_(max_steps),
      max_pages_(max_positions / plan::kKvPagePositions + 1),
      table_{.groups = static_cast<std::int64_t>(plan::kMaxRows * sizeof(StreamedRow)),
             .pages = static_cast<std::int64_t>(plan::kMaxRows *
                                                (sizeof(StreamedRow) + sizeof(RowGroup))),
             .bytes = 0},
      host_tables_(max_steps * plan::kMaxRows *
                       static_cast<std::int64_t>(sizeof(StreamedRow) + sizeof(RowGroup) +
                                                 sizeof(char*) * max_pages_),
                   "tables of rows") {
  for (const std::int32_t operand_rows : {8, 16}) {
    const void*& kernel = kernels_[operand_index(operand_rows)];
    kernel = find_stream_kernel(config.dtype, operand_rows, plan_.pieces, config.head_dim);
    if (kernel == nullptr) continue;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(properties.sharedMemPerBlockOptin)),
          "reserving shared memory");
  }
  table_.bytes =
      table_.pages + plan::kMaxRows * max_pages_ * static_cast<std::int64_t>(sizeof(char*));
  describe_model(config, weights);
  const std::int64_t tickets =
      max_steps * stream_tickets(config.num_layers, config.parallel_residual);
  counters_ = DeviceMemory((tickets + 1) * 4, "counters");
  params_.tickets = counters_.as<std::uint32_t>();
  params_.arrivals = params_.tickets + tickets;
  lamport_ =
      DeviceMemory(std::int64_t{kLamportSets} * layout_of(plan::kMaxRows).bytes, "Lamport buffers");
  params_.lamport = lamport_.as<>();
  params_.logits_stride = static_cast<std::int32_t>((config.vocab_size + 3) / 4 * 4);
  residual_ =
      DeviceMemory(std::int64_t{limits_.sm_count} * config.hidden_size * 4, "the residual stream");
  params_.residual = residual_.as<float2>();
  logits_ =
      DeviceMemory(std::int64_t{plan::kMaxRows} * params_.logits_stride * 4, "logits of many rows");
  chosen_ = DeviceMemory(std::int64_t{max_steps} * plan::kMaxRows * 4, "tokens of many rows");
  tables_ = DeviceMemory(max_steps * table_.bytes, "tables of rows");
}

void StreamDecoder::describe_model(const ModelConfig& config, const DeviceModel& weights) {
  StreamParams& p = params_;
  p.qkv = streamed(plan_.qkv);
  p.mlp_up = streamed(plan_.mlp_up);
  p.mlp_down = streamed(plan_.mlp_down);
  p.attention_out = streamed(plan_.attention_out);
  p.lm_head = streamed(plan_.lm_head);
  p.first_layer = weights.first_streamed_layer();
  p.layer_stride = weights.layer_stride();
  p.embedding = weights.embedding();
  p.lm_head_weight = weights.lm_head();
  p.final_norm_weight = weights.final_norm_weight();
  p.final_norm_bias = weights.final_norm_bias();
  p.rotary = weights.rotary();
  p.num_layers = static_cast<std::int32_t>(config.num_layers);
  p.hidden_size = static_cast<std::int32_t>(config.hidden_size);
  p.intermediate_size = static_cast<std::int32_t>(config.intermediate_size);
  p.num_heads = static_cast<std::int32_t>(config.num_heads);
  p.head_dim = static_cast<std::int32_t>(config.head_dim);
  p.rotary_dim = static_cast<std::int32_t>(config.rotary_dim);
  p.vocab_size = static_cast<std::int32_t>(config.vocab_size);
  p.layer_norm_eps = static_cast<float>(config.layer_norm_eps);
  p.inverse_hidden_size = 1.0f / static_cast<float>(config.hidden_size);
  p.activation = config.activation;
  p.parallel_residual = config.parallel_residual;
  p.stage_bytes = static_cast<std::int32_t>(plan_.stage_bytes);
  p.bias_offset = static_cast<std::int32_t>(plan_.data_bytes);
  p.max_in_flight = kMaxInFlight;
  p.announced_ahead = kAnnouncedAhead;
  p.late_in_flight = kLateInFlight;
  p.late_percent = kLatePercent;
  p.static_percent = kStaticPercent;
  p.ticket_bytes = kTicketBytes;
  p.kv_head_bytes = static_cast<std::int32_t>(plan_.kv.head_bytes);
  p.kv_block_bytes = static_cast<std::int32_t>(plan_.kv.block_bytes);
  p.kv_block_positions = plan_.kv.block_positions;
  p.max_splits = max_splits(config, limits_.sm_count);
}

RowsLayout StreamDecoder::layout_of(std::int32_t rows) const {
  RowsLayout layout{};
  const auto take = [&](std::int64_t bytes) {
    const std::int32_t offset = layout.bytes;
    layout.bytes += static_cast<std::int32_t>((bytes + 255) / 256 * 256);
    return offset;
  };
  const std::int64_t hidden = config_.hidden_size;
  layout.input_norm = take(rows * hidden * 2);
  layout.post_norm = take(rows * hidden * 2);
  layout.qkv = take(rows * hidden * 12);
  layout.mlp = take(rows * config_.intermediate_size * 2);
  layout.attention = take(rows * hidden * 2);
  layout.residual = take((plan_.mlp_down.parts + 1) * rows * hidden * 4);
  layout.partials = take(rows * config_.num_heads * max_splits(config_, limits_.sm_count) *
                         (config_.head_dim + 2) * 4);
  layout.candidates = take(std::int64_t{rows} * limits_.sm_count * kReducerWarps *
                           static_cast<std::int64_t>(sizeof(Candidate)));
  return layout;
}

void StreamDecoder::fill_table(std::span<const DecodeRow> rows, char* host, const char* device) {
  auto* row_table = reinterpret_cast<StreamedRow*>(host);
  auto* pages = reinterpret_cast<char**>(host + table_.pages);
  const auto* device_pages = reinterpret_cast<char* const*>(device + table_.pages);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t first = static_cast<std::int64_t>(i) * max_pages_;
    row_table[i] = {.position = static_cast<std::int32_t>(rows[i].position),
                    .token = rows[i].input,
                    .temperature = rows[i].temperature,
                    .drawable_vocab_size = rows[i].drawable_vocab_size,
                    .seed = rows[i].seed,
                    .kv_pages = device_pages + first};
    std::copy(rows[i].pages.begin(), rows[i].pages.end(), pages + first);
  }
  const auto groups = groups_of(rows, config_, plan_.kv, limits_.sm_count);
  std::copy(groups.begin(), groups.end(), reinterpret_cast<RowGroup*>(host + table_.groups));
  params_.rows = static_cast<std::int32_t>(rows.size());
  params_.groups = static_cast<std::int32_t>(groups.size());
  params_.row_table = reinterpret_cast<const StreamedRow*>(device);
  params_.group_table = reinterpret_cast<const RowGroup*>(device + table_.groups);
}

void StreamDecoder::launch(std::span<const DecodeRow> rows, std::int32_t steps,
                           cudaStream_t stream) {
  const auto count = static_cast<std::int32_t>(rows.size());
  require(steps <= max_steps_, ErrorKind::internal,
          "streaming: expected at most {} steps, found {}", max_steps_, steps);
  params_.steps = steps;
  params_.layout = layout_of(count);
  const plan::StreamMemory memory = plan::stream_memory(plan_, config_, limits_, count);
  params_.stages = memory.stages;
  params_.scratch_bytes = static_cast<std::int32_t>(memory.scratch_bytes);
  check(cudaMemsetAsync(counters_.as<>(), 0, counters_.bytes(), stream), "clearing counters");
  check(cudaMemsetAsync(lamport_.as<>(), 0xff,
                        static_cast<std::size_t>(kLamportSets) * params_.layout.bytes, stream),
        "clearing Lamport buffers");
  // All parts side by side, and what attention's output matrix needs.
  const std::int32_t parts = plan_.mlp_down.parts;
  params_.folds_parts =
      (parts == 2 || parts == 4) && count * (parts + 1) <= plan::operand_rows(count);
  const void* kernel = kernels_[operand_index(plan::operand_rows(count))];
  launch_stream(kernel, params_, limits_.sm_count, memory.shared_bytes, stream);
}

char* StreamDecoder::send(std::span<const DecodeRow> rows, std::int32_t index,
                          cudaStream_t stream) {
  require(index < max_steps_ && std::ssize(rows) <= plan::kMaxRows, ErrorKind::internal,
          "streaming: expected at most {} rows and {} steps, found {} rows in step {}",
          plan::kMaxRows, max_steps_, rows.size(), index);
  char* host = host_tables_.as<>() + index * table_.bytes;
  char* device = tables_.as<>() + index * table_.bytes;
  fill_table(rows, host, device);
  const std::int64_t bytes =
      table_.pages + static_cast<std::int64_t>(rows.size() * max_pages_ * sizeof(char*));
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "sending rows");
  params_.chosen = chosen_.as<std::int32_t>() + index * plan::kMaxRows;
  return device;
}

void StreamDecoder::enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
                            cudaStream_t stream) {
  send(rows, 0, stream);
  params_.logits = with_logits ? logits_.as<float>() : nullptr;
  launch(rows, steps, stream);
}

void StreamDecoder::enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                                 std::span<const TokenId* const> device_inputs,
                                 cudaStream_t stream) {
  char* table = send(rows, index, stream);
  for (std::size_t i = 0; i < device_inputs.size(); ++i)
    if (device_inputs[i] != nullptr)
      check(cudaMemcpyAsync(table + i * sizeof(StreamedRow) + offsetof(StreamedRow, token),
                            device_inputs[i], sizeof(TokenId), cudaMemcpyDeviceToDevice, stream),
            "handing on tokens");
  params_.logits = logits_.as<float>();
  launch(rows, 1, stream);
}

}  // namespace clusterfusion::cuda
