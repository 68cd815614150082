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
#include "backend/cuda/stream/stream_params.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

// One token of one sequence. Rows of one sequence lie side by side, at consecutive positions.
struct DecodeRow {
  std::int64_t position = 0;
  TokenId input = 0;
  float temperature = 0.0f;  // 0: greedy
  std::uint64_t seed = 0;
  std::int32_t drawable_vocab_size = 0;  // tokens from here on are not chosen
  std::span<char* const> pages;          // of its sequence, with room for all steps
};

class StreamDecoder {
 public:
  // Whether there is a kernel for this shape. The reason, if not, is that of make_stream_plan() or
  // of a missing instance.
  static bool supports(const ModelConfig& config, const plan::KvPlan& kv,
                       const cudaDeviceProp& properties);

  // Errors: unsupported (see supports()), out_of_memory.
  StreamDecoder(const ModelConfig& config, const plan::KvPlan& kv, const DeviceModel& weights,
                const cudaDeviceProp& properties, std::int64_t max_positions,
                std::int32_t max_steps);

  // Enqueues `steps` steps of `rows` (at most plan::kMaxRows): the first step's inputs are the
  // rows', each later one's the token that the row has chosen. More than one step only where each
  // sequence has one row. If `with_logits`, the last step's go to logits().
  void enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
               cudaStream_t stream);
  // The same for one step, in a series of which this is number `index`, with input b from
  // device_inputs[b], on the device, where that is not null.
  void enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                    std::span<const TokenId* const> device_inputs, cudaStream_t stream);

  // Of all rows of the following launches.
  void intervene(const LaunchInterventions& interventions) noexcept { interventions.tell(params_); }

  // float32 [vocab] on the device, of the last step; 16-byte aligned.
  const float* logits(std::size_t row) const noexcept {
    return logits_.as<float>() + row * static_cast<std::size_t>(params_.logits_stride);
  }
  // On the device: [steps, rows] of enqueue(), or [rows] of step `index` of a series; -1 where a
  // logit was not finite.
  const std::int32_t* chosen(std::int32_t index = 0) const noexcept {
    return chosen_.as<std::int32_t>() + index * plan::kMaxRows;
  }

  // [SMs, epochs, StreamPoint::count] of the following launches; null: none.
  void record_timeline(std::uint64_t* times) noexcept { params_.timeline = times; }

 private:
  // Rows, groups and page tables as they lie on the device, for one launch.
  struct Table {
    std::int64_t groups = 0, pages = 0, bytes = 0;  // offsets in bytes
  };
  void describe_model(const ModelConfig& config, const DeviceModel& weights);
  RowsLayout layout_of(std::int32_t rows) const;
  void fill_table(std::span<const DecodeRow> rows, char* host, const char* device);
  // Sends the rows of step `index` of a series; returns their table on the device.
  char* send(std::span<const DecodeRow> rows, std::int32_t index, cudaStream_t stream);
  void launch(std::span<const DecodeRow> rows, std::int32_t steps, cudaStream_t stream);

  ModelConfig config_;
  plan::StreamPlan plan_;
  plan::DeviceLimits limits_;
  std::int32_t max_steps_;
  std::int64_t max_pages_;
  Table table_;
  StreamParams params_{};
  const void* kernels_[2] = {};  // for 8 and 16 operand rows
  DeviceMemory counters_, lamport_, residual_, logits_, chosen_, tables_;
  PinnedMemory host_tables_;
};

}  // namespace clusterfusion::cuda
