// The sampling of one sequence at a time on the device, for several steps without the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "backend/cuda/memory.hpp"
#include "backend/cuda/sampling/sample_kernel.hpp"

namespace clusterfusion::cuda {

// begin(), then a choose() for each step, then fetch(); when the stream is done, chosen(). All work
// is enqueued on a stream, the same for all calls. Not thread-safe.
class DeviceSampler {
 public:
  // Errors: out_of_memory.
  DeviceSampler(std::int64_t vocab_size, std::int32_t max_steps);

  // The next steps are those of a sequence that holds `length` tokens, the first step's input among
  // them; choices begin at that position. `tokens`, ids below vocab_size, are what the repetition
  // penalty has seen (it may count a token twice); used only if there is one.
  void begin(const SamplingParams& params, std::span<const TokenId> tokens, std::int64_t length,
             cudaStream_t stream);

  // Chooses the next token from `logits`: float32 [vocab_size] on the device, 16-byte aligned. The
  // repetition penalty of later steps knows it. Returns where it is going to be on the device.
  const TokenId* choose(const float* logits, cudaStream_t stream);

  // Brings what was chosen since begin() to the host.
  void fetch(cudaStream_t stream);

  // What step `step` has chosen, as Sampler::sample() gives it; token -1 where that would throw
  // non_finite.
  SampledToken chosen(std::int32_t step) const;

 private:
  std::size_t num_top() const noexcept {
    return static_cast<std::size_t>(std::clamp(params_.num_logprobs, 0, params_.vocab_size));
  }

  std::int32_t max_steps_;
  std::int32_t steps_ = 0;  // chosen since begin()
  DeviceMemory scratch_, seen_, results_;
  PinnedMemory host_seen_, host_results_;
  SampleParams params_{};  // of the next step
};

}  // namespace clusterfusion::cuda
