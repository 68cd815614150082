// Decode steps of many rows in one launch of the streaming kernel, with all that it needs on the
// device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/device_model.hpp"
#include "backend/cuda/interventions/device_interventions.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/row_decoder.hpp"
#include "backend/cuda/stream/row_tables.hpp"
#include "backend/cuda/stream/stream_params.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

class StreamDecoder final : public RowDecoder {
 public:
  // Whether there is a kernel for this shape. The reason, if not, is that of make_stream_plan() or
  // of a missing instance.
  static bool supports(const ModelConfig& config, const plan::KvPlan& kv,
                       const cudaDeviceProp& properties);

  // Errors: unsupported (see supports()), out_of_memory.
  StreamDecoder(const ModelConfig& config, const plan::KvPlan& kv, const DeviceModel& weights,
                const cudaDeviceProp& properties, std::int64_t max_positions,
                std::int32_t max_steps);

  std::int32_t max_rows() const noexcept override { return plan::kMaxRows; }
  void enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
               cudaStream_t stream) override;
  void enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                    std::span<const TokenId* const> device_inputs, cudaStream_t stream) override;
  void intervene(const LaunchInterventions& interventions) noexcept override {
    interventions.tell(params_);
  }
  const float* logits(std::size_t row) const noexcept override {
    return logits_.as<float>() + row * static_cast<std::size_t>(params_.logits_stride);
  }
  const std::int32_t* chosen(std::int32_t index = 0) const noexcept override {
    return chosen_.as<std::int32_t>() + index * plan::kMaxRows;
  }

  // [SMs, epochs, StreamPoint::count] of the following launches; null: none.
  void record_timeline(std::uint64_t* times) noexcept { params_.timeline = times; }

 private:
  void describe_ring();
  void describe_tickets(const plan::TaskExtent& extent);
  // Sends the rows of step `index` of a series.
  plan::TaskExtent send(std::span<const DecodeRow> rows, std::int32_t index, cudaStream_t stream);
  void launch(std::span<const DecodeRow> rows, const plan::TaskExtent& extent, std::int32_t steps,
              cudaStream_t stream);

  ModelConfig config_;
  plan::StreamPlan plan_;
  plan::DeviceLimits limits_;
  std::int32_t max_steps_;
  StreamParams params_;
  RowTables tables_;
  DeviceMemory counters_, lamport_, residual_, logits_, chosen_;
};

}  // namespace clusterfusion::cuda
