// Decode steps of many rows at once: what the kernels for few and for many rows have in common.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "backend/cuda/interventions/device_interventions.hpp"
#include "clusterfusion/model.hpp"

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

class RowDecoder {
 public:
  virtual ~RowDecoder() = default;

  // Of one step.
  virtual std::int32_t max_rows() const noexcept = 0;

  // Of all rows of what is enqueued from now on.
  virtual void intervene(const LaunchInterventions& interventions) noexcept = 0;
  // Enqueues `steps` steps of `rows`: the first step's inputs are the rows', each later one's the
  // token that the row has chosen. More than one step only where each sequence has one row. If
  // `with_logits`, the last step's go to logits().
  virtual void enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
                       cudaStream_t stream) = 0;
  // The same for one step, in a series of which this is number `index` and whose rows stay the same
  // but for their positions, each one behind the last step's. Input b is device_inputs[b], on the
  // device, where that is not null.
  virtual void enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                            std::span<const TokenId* const> device_inputs, cudaStream_t stream) = 0;

  // float32 [vocab] on the device, of the last step; 16-byte aligned.
  virtual const float* logits(std::size_t row) const noexcept = 0;
  // On the device: [steps, rows] of enqueue(), or [rows] of step `index` of a series, whose steps
  // are max_rows() apart; -1 where a logit was not finite.
  virtual const std::int32_t* chosen(std::int32_t index = 0) const noexcept = 0;
};

}  // namespace clusterfusion::cuda
