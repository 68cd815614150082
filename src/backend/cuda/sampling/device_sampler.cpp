#include "backend/cuda/sampling/device_sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr std::int64_t kStepBytes = sizeof(SampledStep);

}  // namespace

DeviceSampler::DeviceSampler(std::int64_t vocab_size, std::int32_t max_steps)
    : max_steps_(max_steps),
      scratch_((vocab_size + 3) / 4 * 16, "the scores of tokens"),
      seen_((vocab_size + 31) / 32 * 4, "the tokens seen"),
      results_(max_steps * kStepBytes, "the tokens chosen"),
      host_seen_((vocab_size + 31) / 32 * 4, "the tokens seen"),
      host_results_(max_steps * kStepBytes, "the tokens chosen") {
  params_.vocab_size = static_cast<std::int32_t>(vocab_size);
  params_.scratch = scratch_.as<float>();
}

void DeviceSampler::begin(const SamplingParams& params, std::span<const TokenId> tokens,
                          std::int64_t length, cudaStream_t stream) {
  steps_ = 0;
  params_.repetition_penalty = params.repetition_penalty;
  params_.temperature = params.temperature;
  params_.top_k = params.top_k;
  params_.top_p = params.top_p;
  params_.lowest_score = params.min_p > 0.0f ? std::log(static_cast<double>(params.min_p))
                                             : -std::numeric_limits<double>::infinity();
  params_.seed = params.seed;
  params_.position = static_cast<std::uint64_t>(length);
  params_.num_logprobs = params.num_logprobs;
  params_.seen = nullptr;
  if (params.repetition_penalty == 1.0f) return;
  // The last copy from here is done: whoever used its steps has waited for them.
  auto* seen = host_seen_.as<std::uint32_t>();
  std::memset(seen, 0, static_cast<std::size_t>(seen_bytes()));
  for (const TokenId token : tokens) seen[token / 32] |= 1u << token % 32;
  params_.seen = seen_.as<std::uint32_t>();
  check(cudaMemcpyAsync(params_.seen, seen, static_cast<std::size_t>(seen_bytes()),
                        cudaMemcpyHostToDevice, stream),
        "sending the tokens seen");
}

const TokenId* DeviceSampler::choose(const float* logits, cudaStream_t stream) {
  require(steps_ < max_steps_, ErrorKind::internal, "sampling: expected at most {} steps",
          max_steps_);
  params_.logits = logits;
  params_.result = results_.as<SampledStep>() + steps_;
  launch_sample(params_, stream);
  ++steps_;
  ++params_.position;
  return &params_.result->token;
}

void DeviceSampler::fetch(cudaStream_t stream) {
  check(cudaMemcpyAsync(host_results_.as<>(), results_.as<>(),
                        static_cast<std::size_t>(steps_ * kStepBytes), cudaMemcpyDeviceToHost,
                        stream),
        "fetching the tokens chosen");
}

SampledToken DeviceSampler::chosen(std::int32_t step) const {
  const SampledStep& result = host_results_.as<const SampledStep>()[step];
  SampledToken token{result.token, 0.0f, {}};
  if (token.token < 0 || params_.num_logprobs < 0) return token;
  token.logprob = result.logprob;
  token.top.assign(result.top, result.top + std::min(params_.num_logprobs, params_.vocab_size));
  return token;
}

}  // namespace clusterfusion::cuda
