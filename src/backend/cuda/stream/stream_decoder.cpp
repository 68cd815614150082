#include "backend/cuda/stream/stream_decoder.hpp"

#include "backend/cuda/check.hpp"
#include "backend/cuda/decode/decode_setup.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/stream/stream_kernel.hpp"
#include "backend/cuda/stream/stream_setup.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

// Time enough to draw a ticket while a copy lands.
constexpr std::int32_t kAnnouncedAhead = 2;
constexpr std::int32_t kTicketBytes = 40960;
// Where attention is little, of long phases: few tickets, and large ones. (With long contexts that
// lost 5 %.)
constexpr std::int32_t kLargeTicketBytes = 163840, kLargeStaticPercent = 80;

StreamKernel find_kernel(const ModelConfig& config, std::int32_t pieces, std::int32_t rows) {
  return find_stream_kernel(config.dtype, config.head_dim, plan::operand_rows(rows), pieces);
}

}  // namespace

bool StreamDecoder::supports(const ModelConfig& config, const plan::KvPlan& kv,
                             const cudaDeviceProp& properties) {
  if (!has_warpgroups(properties)) return false;
  try {
    const auto plan = plan::make_stream_plan(config, kv, limits_of(properties));
    return find_kernel(config, plan.pieces, 1).function != nullptr &&
           find_kernel(config, plan.pieces, plan::kMaxRows).function != nullptr;
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
      params_(describe_model(config, plan_, kv, weights, limits_.sm_count)),
      tables_({.rows = plan::kMaxRows,
               .pages = max_positions / plan::kKvPagePositions + 1,
               .tables = max_steps,
               .task_queries = find_kernel(config, plan_.pieces, plan::kMaxRows).task_queries}) {
  for (const std::int32_t rows : {1, plan::kMaxRows})
    check(cudaFuncSetAttribute(find_kernel(config, plan_.pieces, rows).function,
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(properties.sharedMemPerBlockOptin)),
          "reserving shared memory");
  describe_ring();
  const std::int64_t tickets =
      max_steps * stream_tickets(config.num_layers, config.parallel_residual);
  counters_ = DeviceMemory((tickets + 1) * 4, "counters");
  params_.tickets = counters_.as<std::uint32_t>();
  params_.arrivals = params_.tickets + tickets;
  lamport_ = DeviceMemory(std::int64_t{kLamportSets} *
                              rows_layout(config, plan_, limits_.sm_count, plan::kMaxRows).bytes,
                          "Lamport buffers");
  params_.lamport = lamport_.as<>();
  params_.logits_stride = static_cast<std::int32_t>((config.vocab_size + 3) / 4 * 4);
  residual_ =
      DeviceMemory(std::int64_t{limits_.sm_count} * config.hidden_size * 4, "the residual stream");
  params_.residual = residual_.as<float2>();
  logits_ =
      DeviceMemory(std::int64_t{plan::kMaxRows} * params_.logits_stride * 4, "logits of many rows");
  chosen_ = DeviceMemory(std::int64_t{max_steps} * plan::kMaxRows * 4, "tokens of many rows");
}

void StreamDecoder::describe_ring() {
  StreamParams& p = params_;
  p.stage_bytes = static_cast<std::int32_t>(plan_.stage_bytes);
  p.bias_offset = static_cast<std::int32_t>(plan_.data_bytes);
  p.max_in_flight = kMaxInFlight;
  p.announced_ahead = kAnnouncedAhead;
  p.late_in_flight = kLateInFlight;
  p.late_percent = kLatePercent;
  p.static_percent = kStaticPercent;
}

void StreamDecoder::describe_tickets(const plan::TaskExtent& extent) {
  std::int64_t weights = 0;
  for (const plan::ProductCut* cut :
       {&plan_.qkv, &plan_.mlp_up, &plan_.mlp_down, &plan_.attention_out})
    weights += cut->rows * cut->columns;
  const std::int64_t keys_and_values = extent.positions * 2 * config_.attention_size();
  const bool is_little = 4 * keys_and_values < weights;
  params_.long_static_percent = is_little ? kLargeStaticPercent : kStaticPercent;
  params_.ticket_bytes = is_little ? kLargeTicketBytes : kTicketBytes;
}

void StreamDecoder::launch(std::span<const DecodeRow> rows, const plan::TaskExtent& extent,
                           std::int32_t steps, cudaStream_t stream) {
  const auto count = static_cast<std::int32_t>(rows.size());
  require(steps <= max_steps_, ErrorKind::internal,
          "streaming: expected at most {} steps, found {}", max_steps_, steps);
  params_.steps = steps;
  describe_tickets(extent);
  params_.layout = rows_layout(config_, plan_, limits_.sm_count, count);
  const plan::StreamMemory memory = plan::stream_memory(plan_, config_, limits_, count, extent);
  params_.stages = memory.stages;
  params_.scratch_bytes = static_cast<std::int32_t>(memory.scratch_bytes);
  params_.task_layout = memory.task;
  params_.task_queries = extent.queries;
  params_.task_slots = memory.task_slots;
  params_.tasks_offset = static_cast<std::int32_t>(memory.tasks_offset);
  params_.keeps_tasks = memory.keeps_tasks;
  params_.keeps_inputs = memory.keeps_inputs;
  check(cudaMemsetAsync(counters_.as<>(), 0, counters_.bytes(), stream), "clearing counters");
  check(cudaMemsetAsync(lamport_.as<>(), 0xff,
                        static_cast<std::size_t>(kLamportSets) * params_.layout.bytes, stream),
        "clearing Lamport buffers");
  // All parts side by side, and what attention's output matrix needs.
  const std::int32_t parts = plan_.mlp_down.parts;
  params_.folds_parts =
      (parts == 2 || parts == 4) && count * (parts + 1) <= plan::operand_rows(count);
  const StreamKernel kernel = find_kernel(config_, plan_.pieces, count);
  launch_stream(kernel.function, params_, limits_.sm_count, memory.shared_bytes, stream);
}

plan::TaskExtent StreamDecoder::send(std::span<const DecodeRow> rows, std::int32_t index,
                                     cudaStream_t stream) {
  params_.chosen = chosen_.as<std::int32_t>() + index * plan::kMaxRows;
  return tables_.send(rows, index, limits_.sm_count, params_, stream);
}

void StreamDecoder::enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
                            cudaStream_t stream) {
  const plan::TaskExtent extent = send(rows, 0, stream);
  params_.logits = with_logits ? logits_.as<float>() : nullptr;
  launch(rows, extent, steps, stream);
}

void StreamDecoder::enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                                 std::span<const TokenId* const> device_inputs,
                                 cudaStream_t stream) {
  const plan::TaskExtent extent = send(rows, index, stream);
  for (std::size_t i = 0; i < device_inputs.size(); ++i)
    if (device_inputs[i] != nullptr)
      check(cudaMemcpyAsync(tables_.input(index, i), device_inputs[i], sizeof(TokenId),
                            cudaMemcpyDeviceToDevice, stream),
            "handing on tokens");
  params_.logits = logits_.as<float>();
  launch(rows, extent, 1, stream);
}

}  // namespace clusterfusion::cuda
