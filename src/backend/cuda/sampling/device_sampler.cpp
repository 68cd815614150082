#include "backend/cuda/sampling/device_sampler.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr std::int64_t kStepBytes = sizeof(SampledStep);

// A bit for each token.
constexpr std::int64_t bits_bytes(std::int64_t vocab_size) { return (vocab_size + 31) / 32 * 4; }

}  // namespace

DeviceSampler::DeviceSampler(std::int64_t vocab_size, std::int32_t max_steps)
    : max_steps_(max_steps),
      scratch_((vocab_size + 3) / 4 * 16, "the scores of tokens"),
      seen_(bits_bytes(vocab_size), "the tokens seen"),
      results_(max_steps * kStepBytes, "the tokens chosen"),
      host_seen_(bits_bytes(vocab_size), "the tokens seen"),
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
  params_.drawable_vocab_size = params_.vocab_size;
  if (params.drawable_vocab_size > 0 && params.drawable_vocab_size < params_.vocab_size)
    params_.drawable_vocab_size = static_cast<std::int32_t>(params.drawable_vocab_size);
  params_.seen = nullptr;
  if (params.repetition_penalty == 1.0f) return;
  // The last copy from here is done: whoever used its steps has waited for them.
  auto* seen = host_seen_.as<std::uint32_t>();
  const auto bytes = static_cast<std::size_t>(seen_.bytes());
  std::memset(seen, 0, bytes);
  for (const TokenId token : tokens) seen[token / 32] |= 1u << token % 32;
  params_.seen = seen_.as<std::uint32_t>();
  check(cudaMemcpyAsync(params_.seen, seen, bytes, cudaMemcpyHostToDevice, stream),
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
  // Of each step only what it has written.
  const auto bytes = offsetof(SampledStep, top) + num_top() * sizeof(TokenLogprob);
  check(cudaMemcpy2DAsync(host_results_.as<>(), kStepBytes, results_.as<>(), kStepBytes, bytes,
                          static_cast<std::size_t>(steps_), cudaMemcpyDeviceToHost, stream),
        "fetching the tokens chosen");
}

SampledToken DeviceSampler::chosen(std::int32_t step) const {
  const SampledStep& result = host_results_.as<const SampledStep>()[step];
  SampledToken token{result.token, 0.0f, {}};
  if (token.token < 0 || params_.num_logprobs < 0) return token;
  token.logprob = result.logprob;
  token.top.assign(result.top, result.top + num_top());
  return token;
}

}  // namespace clusterfusion::cuda
